//! The agent of one machine: model store, supervisor, heartbeat, gateway

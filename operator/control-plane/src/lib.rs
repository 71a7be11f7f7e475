//! The embedded, Kubernetes-shaped API

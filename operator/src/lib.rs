//! The controllers

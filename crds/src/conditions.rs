//! Condition types and reasons. They follow kstatus, so `kubectl wait`, Flux and Argo CD understand them.

/// The object does what its spec asks.
pub const READY: &str = "Ready";
/// Work towards the spec is going on. Present and True only while it is.
pub const RECONCILING: &str = "Reconciling";
/// Nothing more will happen without a change by a person. Present and True only then.
pub const STALLED: &str = "Stalled";
/// Every policy that selects the object is met.
pub const POLICY_COMPLIANT: &str = "PolicyCompliant";
/// The model's bytes were checked against `sha256`.
pub const MODEL_VERIFIED: &str = "ModelVerified";
/// The device in use is not the one that was asked for.
pub const ACCELERATOR_DEGRADED: &str = "AcceleratorDegraded";
/// The watchdog holds back: its budget is spent.
pub const REMEDIATION_SUSPENDED: &str = "RemediationSuspended";
/// A probe fails.
pub const HEALTHY: &str = "Healthy";
/// The machine's heartbeats arrive. Written by the operator, because a silent agent cannot tell it.
pub const REACHABLE: &str = "Reachable";
/// What the policy asks for and this version cannot hold.
pub const FULLY_ENFORCED: &str = "FullyEnforced";

/// Reasons, the machine-readable half of a condition.
pub mod reason {
    /// All replicas answer.
    pub const SERVING: &str = "Serving";
    /// On demand, and asleep until the first request.
    pub const IDLE: &str = "Idle";
    /// Some replicas are not ready yet.
    pub const PROGRESSING: &str = "Progressing";
    /// The model is being fetched.
    pub const FETCHING: &str = "Fetching";
    /// The model is being loaded.
    pub const LOADING: &str = "Loading";
    /// No machine can take the model now.
    pub const NO_ROOM: &str = "NoRoom";
    /// No machine is known.
    pub const NO_NODES: &str = "NoNodes";
    /// The spec cannot be carried out.
    pub const INVALID_SPEC: &str = "InvalidSpec";
    /// A policy forbids it.
    pub const POLICY_VIOLATION: &str = "PolicyViolation";
    /// Another object holds the name.
    pub const NAME_TAKEN: &str = "NameTaken";
    /// The digest of the bytes is not the one in the spec.
    pub const DIGEST_MISMATCH: &str = "DigestMismatch";
    /// The file is not a sound model.
    pub const INVALID_MODEL: &str = "InvalidModel";
    /// The source could not be read.
    pub const FETCH_FAILED: &str = "FetchFailed";
    /// The disk has no room for the model.
    pub const DISK_FULL: &str = "DiskFull";
    /// The machine has no memory for the model.
    pub const INSUFFICIENT_MEMORY: &str = "InsufficientMemory";
    /// The worker ended unexpectedly.
    pub const CRASHED: &str = "Crashed";
    /// The spec is held by its owner (`spec.suspend`).
    pub const SUSPENDED: &str = "Suspended";
    /// This version does not carry out a field that is set.
    pub const NOT_SUPPORTED: &str = "NotSupported";
    /// The new revision failed and the last good one was put back.
    pub const ROLLED_BACK: &str = "RolledBack";
    /// All is in order.
    pub const AS_EXPECTED: &str = "AsExpected";
    /// A probe is over its threshold.
    pub const PROBE_FAILED: &str = "ProbeFailed";
    /// No machine has reported a result yet.
    pub const NO_RESULT: &str = "NoResult";
    /// The heartbeat of the machine stopped.
    pub const NODE_SILENT: &str = "NodeSilent";
    /// The restart budget is spent.
    pub const BUDGET_SPENT: &str = "BudgetSpent";
}

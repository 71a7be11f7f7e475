//! What the API serves: the built-in kinds and the kinds of the given CRDs.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::{Value, json};

use crate::built_in;
use crate::json::tidy_numbers;
use crate::scale::Scale;
use crate::schema::Structural;

/// A column of `kubectl get`.
#[derive(Clone, Debug)]
pub(crate) struct Column {
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) description: String,
    /// 0 is always shown, more only with `-o wide`.
    pub(crate) priority: i32,
    /// Where the value stands, such as `.status.phase`.
    pub(crate) path: String,
}

/// One served resource.
#[derive(Debug)]
pub(crate) struct Resource {
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) kind: String,
    pub(crate) plural: String,
    pub(crate) singular: String,
    pub(crate) short_names: Vec<String>,
    pub(crate) categories: Vec<String>,
    pub(crate) namespaced: bool,
    /// Whether it comes from a CRD. The others are checked against their Rust types.
    pub(crate) custom: bool,
    /// None for what is not stored.
    pub(crate) schema: Option<Structural>,
    /// Whether an update may leave out the `resourceVersion` that it is based on.
    pub(crate) unconditional_update: bool,
    /// Whether an update makes what is not there.
    pub(crate) created_by_update: bool,
    pub(crate) status_subresource: bool,
    pub(crate) scale: Option<Scale>,
    pub(crate) columns: Vec<Column>,
    /// Whether a table begins with the name. One of events tells what happened first.
    pub(crate) name_first: bool,
    /// Paths such as `spec.enforcement`, besides `metadata.name` and `metadata.namespace`.
    pub(crate) selectable: Vec<String>,
    pub(crate) verbs: &'static [&'static str],
    /// Where objects are stored; `events.k8s.io` shares the storage of core events.
    pub(crate) storage: String,
}

/// Every verb of a resource that is stored.
pub(crate) const ALL_VERBS: &[&str] = &[
    "delete",
    "deletecollection",
    "get",
    "list",
    "patch",
    "create",
    "update",
    "watch",
];
/// The same as built-in kinds list them.
const BUILT_IN_VERBS: &[&str] = &[
    "create",
    "delete",
    "deletecollection",
    "get",
    "list",
    "patch",
    "update",
    "watch",
];
const READ_VERBS: &[&str] = &["get", "list", "watch"];
const CREATE_ONLY: &[&str] = &["create"];

impl Resource {
    /// `v1` or `group/version`.
    pub(crate) fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.clone()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    fn built_in(group: &str, version: &str, kind: &str, plural: &str, namespaced: bool) -> Self {
        Self {
            group: group.to_owned(),
            version: version.to_owned(),
            kind: kind.to_owned(),
            plural: plural.to_owned(),
            singular: kind.to_lowercase(),
            short_names: Vec::new(),
            categories: Vec::new(),
            namespaced,
            custom: false,
            schema: built_in::schema(kind),
            unconditional_update: kind != "Lease",
            created_by_update: matches!(kind, "Lease" | "Event"),
            status_subresource: false,
            scale: None,
            columns: vec![column("Age", "date", ".metadata.creationTimestamp")],
            name_first: true,
            selectable: Vec::new(),
            verbs: BUILT_IN_VERBS,
            storage: plural.to_owned(),
        }
    }

    fn short(mut self, names: &[&str]) -> Self {
        self.short_names = names.iter().map(|&name| name.to_owned()).collect();
        self
    }

    fn columns(mut self, columns: Vec<Column>) -> Self {
        self.columns = columns;
        self
    }

    fn selectable(mut self, paths: &[&str]) -> Self {
        self.selectable = paths.iter().map(|&path| path.to_owned()).collect();
        self
    }
}

fn described(column: Column, description: &str) -> Column {
    Column {
        description: description.to_owned(),
        ..column
    }
}

fn column(name: &str, kind: &str, path: &str) -> Column {
    Column {
        name: name.to_owned(),
        kind: kind.to_owned(),
        description: String::new(),
        priority: 0,
        path: path.to_owned(),
    }
}

/// Everything that is served: built-in kinds first, then those of `crds`.
///
/// # Errors
/// When a CRD has no served version with a schema that this server understands.
pub(crate) fn all(crds: &[CustomResourceDefinition]) -> Result<Vec<Resource>, String> {
    let mut resources = built_ins();
    for crd in crds {
        resources.push(from_crd(crd)?);
    }
    Ok(resources)
}

fn built_ins() -> Vec<Resource> {
    let age = || column("Age", "date", ".metadata.creationTimestamp");
    let mut namespaces = Resource::built_in("", "v1", "Namespace", "namespaces", false)
        .short(&["ns"])
        .columns(vec![
            described(
                column("Status", "string", ".status.phase"),
                "The status of the namespace",
            ),
            age(),
        ])
        .selectable(&["status.phase"]);
    namespaces.status_subresource = true;
    let events = |group: &str| {
        let detail = |name: &str, path: &str| Column {
            priority: 1,
            ..column(name, "string", path)
        };
        let columns = vec![
            described(
                column("Last Seen", "string", "@lastSeen"),
                "The time at which the most recent occurrence of this event was recorded.",
            ),
            column("Type", "string", ".type"),
            column("Reason", "string", ".reason"),
            described(
                column("Object", "string", "@involvedObject"),
                "The object that this event is about.",
            ),
            detail("Subobject", ".involvedObject.fieldPath"),
            described(
                detail("Source", "@source"),
                "The component reporting this event. Should be a short machine understandable string.",
            ),
            column("Message", "string", ".message"),
            described(
                detail("First Seen", "@firstSeen"),
                "The time at which the event was first recorded. (Time of server receipt is in TypeMeta.)",
            ),
            described(
                detail("Count", "@count"),
                "The number of times this event has occurred.",
            ),
            detail("Name", ".metadata.name"),
        ];
        let mut resource = Resource::built_in(group, "v1", "Event", "events", true)
            .short(&["ev"])
            .columns(columns);
        resource.storage = "events".to_owned();
        resource.name_first = false;
        resource
    };
    let core_events = events("").selectable(&[
        "involvedObject.kind",
        "involvedObject.namespace",
        "involvedObject.name",
        "involvedObject.uid",
        "involvedObject.apiVersion",
        "involvedObject.resourceVersion",
        "involvedObject.fieldPath",
        "reason",
        "reportingComponent",
        "source",
        "type",
    ]);
    let new_events = events("events.k8s.io");
    let mut crds = Resource::built_in(
        "apiextensions.k8s.io",
        "v1",
        "CustomResourceDefinition",
        "customresourcedefinitions",
        false,
    )
    .short(&["crd", "crds"])
    .columns(vec![column("Created At", "date", ".metadata.creationTimestamp")]);
    crds.verbs = READ_VERBS;
    let mut whoami = Resource::built_in(
        "authentication.k8s.io",
        "v1",
        "SelfSubjectReview",
        "selfsubjectreviews",
        false,
    );
    whoami.verbs = CREATE_ONLY;
    let mut can_i = Resource::built_in(
        "authorization.k8s.io",
        "v1",
        "SelfSubjectAccessReview",
        "selfsubjectaccessreviews",
        false,
    );
    can_i.verbs = CREATE_ONLY;
    vec![
        Resource::built_in("", "v1", "ConfigMap", "configmaps", true)
            .short(&["cm"])
            .columns(vec![column("Data", "integer", "@dataCount"), age()]),
        core_events,
        namespaces,
        Resource::built_in("", "v1", "Secret", "secrets", true)
            .selectable(&["type"])
            .columns(vec![
                column("Type", "string", ".type"),
                column("Data", "integer", "@dataCount"),
                age(),
            ]),
        crds,
        whoami,
        can_i,
        Resource::built_in("coordination.k8s.io", "v1", "Lease", "leases", true)
            .columns(vec![column("Holder", "string", ".spec.holderIdentity"), age()]),
        new_events,
    ]
}

fn from_crd(crd: &CustomResourceDefinition) -> Result<Resource, String> {
    let names = &crd.spec.names;
    let version = crd
        .spec
        .versions
        .iter()
        .find(|version| version.served && version.storage);
    let version = version.ok_or_else(|| format!("CRD {} has no served and stored version", names.plural))?;
    let schema = version
        .schema
        .as_ref()
        .and_then(|schema| schema.open_api_v3_schema.as_ref());
    let schema = schema.ok_or_else(|| format!("CRD {} has no schema", names.plural))?;
    let schema = serde_json::to_value(schema).map_err(|error| error.to_string())?;
    let mut columns: Vec<Column> = version
        .additional_printer_columns
        .iter()
        .flatten()
        .map(|c| Column {
            name: c.name.clone(),
            kind: c.type_.clone(),
            description: c.description.clone().unwrap_or_default(),
            priority: c.priority.unwrap_or(0),
            path: c.json_path.clone(),
        })
        .collect();
    if columns.is_empty() {
        columns.push(column("Age", "date", ".metadata.creationTimestamp"));
    }
    let selectable = version.selectable_fields.iter().flatten();
    Ok(Resource {
        group: crd.spec.group.clone(),
        version: version.name.clone(),
        kind: names.kind.clone(),
        plural: names.plural.clone(),
        singular: names
            .singular
            .clone()
            .unwrap_or_else(|| names.kind.to_lowercase()),
        short_names: names.short_names.clone().unwrap_or_default(),
        categories: names.categories.clone().unwrap_or_default(),
        namespaced: crd.spec.scope == "Namespaced",
        custom: true,
        schema: Some(Structural::new(schema)),
        unconditional_update: false,
        created_by_update: false,
        scale: version
            .subresources
            .as_ref()
            .and_then(|s| s.scale.as_ref())
            .map(|scale| {
                let selector = scale.label_selector_path.as_deref();
                Scale::new(&scale.spec_replicas_path, &scale.status_replicas_path, selector)
            }),
        status_subresource: version.subresources.as_ref().is_some_and(|s| s.status.is_some()),
        columns,
        name_first: true,
        selectable: selectable
            .map(|f| f.json_path.trim_start_matches('.').to_owned())
            .collect(),
        verbs: ALL_VERBS,
        storage: format!("{}.{}", names.plural, crd.spec.group),
    })
}

/// A CRD as it is served: with the status of one that was accepted.
pub(crate) fn served_crd(crd: &CustomResourceDefinition, now: &str) -> Value {
    let mut value = serde_json::to_value(crd).unwrap_or_default();
    value["apiVersion"] = json!("apiextensions.k8s.io/v1");
    value["kind"] = json!("CustomResourceDefinition");
    let named = value["spec"]["names"]["listKind"].is_string();
    if !named {
        let kind = &crd.spec.names.kind;
        value["spec"]["names"]["listKind"] = json!(format!("{kind}List"));
    }
    if value["spec"]["conversion"].is_null() {
        value["spec"]["conversion"] = json!({"strategy": "None"});
    }
    tidy_numbers(&mut value);
    let condition = |kind: &str, reason: &str, message: &str| json!({"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": now});
    let versions: Vec<&str> = crd.spec.versions.iter().map(|v| v.name.as_str()).collect();
    value["status"] = json!({
        "acceptedNames": value["spec"]["names"],
        "conditions": [condition("NamesAccepted", "NoConflicts", "no conflicts found"), condition("Established", "InitialNamesAccepted", "the initial names have been accepted")],
        "storedVersions": versions,
    });
    value
}

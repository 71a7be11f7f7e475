//! Sets of fields, as `metadata.managedFields` writes them (FieldsV1), and walks over values by schema.
//!
//! A path element is written as in FieldsV1: `f:name` a field, `k:{…}` a list item by its keys, `v:…` an
//! item of a set. Source: structured-merge-diff, KEP-555.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::schema::{ListKeys, list_keys};

/// A set of field paths, as a tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FieldSet {
    /// Whether the path that ends here is in the set.
    pub(crate) here: bool,
    pub(crate) children: BTreeMap<String, FieldSet>,
}

impl FieldSet {
    pub(crate) fn is_empty(&self) -> bool {
        !self.here && self.children.values().all(FieldSet::is_empty)
    }

    pub(crate) fn child(&mut self, element: &str) -> &mut FieldSet {
        self.children.entry(element.to_owned()).or_default()
    }

    pub(crate) fn from_fields_v1(value: &Value) -> Self {
        let Some(object) = value.as_object() else {
            return Self::default();
        };
        if object.is_empty() {
            return Self {
                here: true,
                children: BTreeMap::new(),
            };
        }
        let children = object.iter().filter(|(key, _)| key.as_str() != ".");
        let mut set = Self {
            here: object.contains_key("."),
            children: children
                .map(|(k, v)| (k.clone(), Self::from_fields_v1(v)))
                .collect(),
        };
        set.children.retain(|_, child| !child.is_empty());
        set
    }

    pub(crate) fn to_fields_v1(&self) -> Value {
        let mut object = Map::new();
        if self.here && !self.children.is_empty() {
            object.insert(".".to_owned(), Value::Object(Map::new()));
        }
        for (key, child) in self.children.iter().filter(|(_, child)| !child.is_empty()) {
            object.insert(key.clone(), child.to_fields_v1());
        }
        Value::Object(object)
    }

    pub(crate) fn union(&mut self, other: &FieldSet) {
        self.here |= other.here;
        for (key, child) in &other.children {
            self.child(key).union(child);
        }
    }

    /// Removes every path of `other`.
    pub(crate) fn subtract(&mut self, other: &FieldSet) {
        self.here &= !other.here;
        for (key, child) in &other.children {
            if let Some(mine) = self.children.get_mut(key) {
                mine.subtract(child);
            }
        }
        self.children.retain(|_, child| !child.is_empty());
    }

    /// The paths that are in both.
    pub(crate) fn intersection(&self, other: &FieldSet) -> FieldSet {
        let mut both = FieldSet {
            here: self.here && other.here,
            children: BTreeMap::new(),
        };
        for (key, child) in &self.children {
            if let Some(theirs) = other.children.get(key) {
                let shared = child.intersection(theirs);
                if !shared.is_empty() {
                    both.children.insert(key.clone(), shared);
                }
            }
        }
        both
    }

    /// Removes a whole branch, such as `f:status`.
    pub(crate) fn without(mut self, element: &str) -> Self {
        self.children.remove(element);
        self
    }

    /// The paths as the API server writes them in conflicts: `.spec.replicas`, `.spec.checks[name="x"]`.
    pub(crate) fn paths(&self) -> Vec<String> {
        let mut found = Vec::new();
        self.collect(String::new(), &mut found);
        found
    }

    fn collect(&self, path: String, found: &mut Vec<String>) {
        let children = || self.children.iter().map(|(key, child)| (written(key), child));
        for (element, _) in children().filter(|(_, child)| child.here) {
            found.push(format!("{path}{element}"));
        }
        for (element, child) in children() {
            child.collect(format!("{path}{element}"), found);
        }
    }

    /// The set with every declared field on the way to what is in it: to own `.spec.model.path` is to own
    /// `.spec.model`, but to own a label is not to own the labels.
    pub(crate) fn with_named_fields(&self, schema: Option<&Value>) -> Self {
        let children = self.children.iter().map(|(element, child)| {
            let name = element.strip_prefix("f:");
            let below = match name {
                Some(name) => field_schema(schema, name),
                None => item_schema(schema),
            };
            let mut child = child.with_named_fields(below);
            child.here |= name.is_some_and(|name| is_declared(schema, name));
            (element.clone(), child)
        });
        Self {
            here: self.here,
            children: children.collect(),
        }
    }
}

/// An element as the API server writes it in a path: `.name`, `[name="x"]`, `[="x"]`.
pub(crate) fn written(element: &str) -> String {
    match element.split_once(':') {
        Some(("f", name)) => format!(".{name}"),
        Some(("k", keys)) => {
            let keys: Map<String, Value> = serde_json::from_str(keys).unwrap_or_default();
            let parts: Vec<String> = keys.iter().map(|(k, v)| format!("{k}={v}")).collect();
            format!("[{}]", parts.join(","))
        }
        Some(("v", value)) => format!("[={value}]"),
        _ => format!("[{element}]"),
    }
}

/// What a schema says of a value's shape. Values without a schema have granular maps and atomic lists.
pub(crate) enum Shape<'a> {
    /// One value, replaced as a whole.
    Leaf,
    /// Fields, each on its own.
    Fields(&'a Map<String, Value>),
    /// Items, each on its own.
    Items(&'a [Value], ListKeys),
}

pub(crate) fn shape<'a>(schema: Option<&Value>, value: &'a Value) -> Shape<'a> {
    let is = |name: &str, what: &str| schema.and_then(|s| s.get(name)).and_then(Value::as_str) == Some(what);
    match value {
        Value::Object(fields)
            if !is("x-kubernetes-map-type", "atomic") && !is("x-kubernetes-struct-type", "atomic") =>
        {
            Shape::Fields(fields)
        }
        Value::Array(items) => match schema.map_or(ListKeys::Atomic, list_keys) {
            ListKeys::Atomic => Shape::Leaf,
            keys => Shape::Items(items, keys),
        },
        _ => Shape::Leaf,
    }
}

/// Schema of a field.
pub(crate) fn field_schema<'a>(schema: Option<&'a Value>, name: &str) -> Option<&'a Value> {
    let schema = schema?;
    let property = schema.get("properties").and_then(|p| p.get(name));
    property.or_else(|| schema.get("additionalProperties").filter(|a| a.is_object()))
}

/// Whether the schema names the field, rather than allowing any name.
pub(crate) fn is_declared(schema: Option<&Value>, name: &str) -> bool {
    let properties = schema.and_then(|schema| schema.get("properties"));
    properties.is_some_and(|properties| properties.get(name).is_some())
}

pub(crate) fn item_schema(schema: Option<&Value>) -> Option<&Value> {
    schema?.get("items")
}

/// The element that names an item of a list; `schema` is that of the items, and has the defaults of keys.
pub(crate) fn item_element(schema: Option<&Value>, item: &Value, keys: &ListKeys) -> String {
    match keys {
        ListKeys::Map(names) => {
            let mut names: Vec<&String> = names.iter().collect();
            names.sort();
            let object: Map<String, Value> = names
                .into_iter()
                .filter_map(|k| {
                    let default = || field_schema(schema, k)?.get("default");
                    Some((k.clone(), item.get(k).or_else(default)?.clone()))
                })
                .collect();
            format!("k:{}", Value::Object(object))
        }
        ListKeys::Set | ListKeys::Atomic => format!("v:{item}"),
    }
}

/// Every field that `value` sets.
pub(crate) fn fields_of(schema: Option<&Value>, value: &Value) -> FieldSet {
    let mut set = FieldSet::default();
    match shape(schema, value) {
        Shape::Leaf => set.here = true,
        Shape::Fields(fields) => {
            set.here = fields.is_empty();
            for (name, child) in fields {
                let mut below = fields_of(field_schema(schema, name), child);
                // Like an item of a list, an entry of a map is owned itself.
                below.here |= !is_declared(schema, name);
                if !below.is_empty() {
                    set.children.insert(format!("f:{name}"), below);
                }
            }
        }
        Shape::Items(items, keys) => {
            // A list of items that are owned one by one is not owned itself, even with nothing in it.
            let below = item_schema(schema);
            for item in items {
                let mut child = if matches!(keys, ListKeys::Map(_)) {
                    fields_of(below, item)
                } else {
                    FieldSet::default()
                };
                child.here = true;
                set.children.insert(item_element(below, item, &keys), child);
            }
        }
    }
    set
}

/// What differs between two values: fields that are new or changed, and fields that are gone.
pub(crate) fn compare(
    schema: Option<&Value>,
    old: Option<&Value>,
    new: Option<&Value>,
) -> (FieldSet, FieldSet) {
    match (old, new) {
        (None, None) => (FieldSet::default(), FieldSet::default()),
        (None, Some(new)) => (whole(&fields_of(schema, new)), FieldSet::default()),
        (Some(old), None) => (FieldSet::default(), whole(&fields_of(schema, old))),
        (Some(old), Some(new)) if old == new => (FieldSet::default(), FieldSet::default()),
        (Some(old), Some(new)) => compare_values(schema, old, new),
    }
}

fn compare_values(schema: Option<&Value>, old: &Value, new: &Value) -> (FieldSet, FieldSet) {
    let (mut changed, mut removed) = (FieldSet::default(), FieldSet::default());
    let mut descend = |element: String, schema: Option<&Value>, old: Option<&Value>, new: Option<&Value>| {
        let (c, r) = compare(schema, old, new);
        if !c.is_empty() {
            changed.children.insert(element.clone(), c);
        }
        if !r.is_empty() {
            removed.children.insert(element, r);
        }
    };
    match (shape(schema, old), shape(schema, new)) {
        (Shape::Fields(before), Shape::Fields(after)) => {
            for (name, value) in before {
                descend(
                    format!("f:{name}"),
                    field_schema(schema, name),
                    Some(value),
                    after.get(name),
                );
            }
            for (name, value) in after.iter().filter(|(name, _)| !before.contains_key(*name)) {
                descend(format!("f:{name}"), field_schema(schema, name), None, Some(value));
            }
        }
        (Shape::Items(before, keys), Shape::Items(after, _)) => {
            let item_schema = item_schema(schema);
            let find = |items: &[Value], element: &str| {
                items
                    .iter()
                    .find(|item| item_element(item_schema, item, &keys) == element)
                    .cloned()
            };
            for item in before {
                let element = item_element(item_schema, item, &keys);
                let counterpart = find(after, &element);
                descend(element.clone(), item_schema, Some(item), counterpart.as_ref());
            }
            for item in after {
                let element = item_element(item_schema, item, &keys);
                if find(before, &element).is_none() {
                    descend(element, item_schema, None, Some(item));
                }
            }
        }
        // One of them is a leaf: everything of the old one is gone, and the new one is new.
        _ => {
            changed = whole(&fields_of(schema, new));
            removed = whole(&fields_of(schema, old));
            removed.subtract(&changed);
        }
    }
    (changed, removed)
}

/// The set with every path on the way: who adds or removes a field with all that is in it does so to the
/// structure as well.
fn whole(set: &FieldSet) -> FieldSet {
    FieldSet {
        here: true,
        children: set.children.iter().map(|(k, v)| (k.clone(), whole(v))).collect(),
    }
}

//! Just enough of Kubernetes' protobuf for what kubectl sends in it: `create namespace`, `create configmap`,
//! `create secret`, `auth whoami` and `auth can-i`. Answers are always JSON, which every client accepts.
//!
//! Source: `k8s.io/api/core/v1/generated.proto` and `k8s.io/apimachinery/pkg/runtime/generated.proto`; the
//! numbers below are theirs.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

/// What stands in front of every object.
const MAGIC: &[u8] = b"k8s\0";

/// One field of a message: its number and, where it has one, its content.
type Field<'a> = (u64, Content<'a>);

enum Content<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Reads an object.
///
/// # Errors
/// In words, when it does not read or is of a kind that this server does not take in protobuf.
pub(crate) fn read(body: &[u8]) -> Result<Value, String> {
    let body = body
        .strip_prefix(MAGIC)
        .ok_or("the body is not a Kubernetes protobuf object")?;
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    for field in fields(body)? {
        match field {
            (1, Content::Bytes(type_meta)) => {
                for field in fields(type_meta)? {
                    match field {
                        (1, Content::Bytes(bytes)) => api_version = text(bytes)?,
                        (2, Content::Bytes(bytes)) => kind = text(bytes)?,
                        _ => {}
                    }
                }
            }
            (2, Content::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    let mut object = Map::new();
    object.insert("apiVersion".to_owned(), json!(api_version));
    object.insert("kind".to_owned(), json!(kind));
    for (number, content) in fields(raw)? {
        match (kind.as_str(), number, content) {
            ("Namespace" | "ConfigMap" | "Secret", 1, Content::Bytes(bytes)) => {
                object.insert("metadata".to_owned(), metadata(bytes)?);
            }
            ("ConfigMap", 2, Content::Bytes(entry)) => put(&mut object, "data", entry, text)?,
            ("ConfigMap", 3, Content::Bytes(entry)) => put(&mut object, "binaryData", entry, base64)?,
            ("Secret", 2, Content::Bytes(entry)) => put(&mut object, "data", entry, base64)?,
            ("Secret", 3, Content::Bytes(bytes)) if !bytes.is_empty() => {
                object.insert("type".to_owned(), json!(text(bytes)?));
            }
            ("Secret", 4, Content::Bytes(entry)) => put(&mut object, "stringData", entry, text)?,
            ("ConfigMap", 4, Content::Number(flag)) | ("Secret", 5, Content::Number(flag)) => {
                object.insert("immutable".to_owned(), json!(flag != 0));
            }
            // A new namespace has no say in its spec and status, and of a review only the kind matters.
            ("Namespace" | "ConfigMap" | "Secret" | "SelfSubjectReview" | "SelfSubjectAccessReview", ..) => {}
            (other, ..) => {
                return Err(format!(
                    "a {other} is not taken as protobuf; send it as application/json"
                ));
            }
        }
    }
    Ok(Value::Object(object))
}

fn metadata(bytes: &[u8]) -> Result<Value, String> {
    let mut metadata = Map::new();
    for (number, content) in fields(bytes)? {
        let Content::Bytes(bytes) = content else { continue };
        let name = match number {
            1 => "name",
            2 => "generateName",
            3 => "namespace",
            11 => {
                put(&mut metadata, "labels", bytes, text)?;
                continue;
            }
            12 => {
                put(&mut metadata, "annotations", bytes, text)?;
                continue;
            }
            13 | 14 => {
                let what = "owner references and finalizers are not taken as protobuf; send application/json";
                return Err(what.to_owned());
            }
            // What a server writes, and what it ignores in a new object.
            _ => continue,
        };
        if !bytes.is_empty() {
            metadata.insert(name.to_owned(), json!(text(bytes)?));
        }
    }
    Ok(Value::Object(metadata))
}

/// Puts one entry of a map field.
fn put(
    object: &mut Map<String, Value>,
    field: &str,
    entry: &[u8],
    value: impl Fn(&[u8]) -> Result<String, String>,
) -> Result<(), String> {
    let (mut key, mut found) = (String::new(), String::new());
    for field in fields(entry)? {
        match field {
            (1, Content::Bytes(bytes)) => key = text(bytes)?,
            (2, Content::Bytes(bytes)) => found = value(bytes)?,
            _ => {}
        }
    }
    let map = object.entry(field).or_insert_with(|| json!({}));
    if let Some(map) = map.as_object_mut() {
        map.insert(key, json!(found));
    }
    Ok(())
}

fn text(bytes: &[u8]) -> Result<String, String> {
    String::from_utf8(bytes.to_vec()).map_err(|error| format!("a text in the body is not UTF-8: {error}"))
}

fn base64(bytes: &[u8]) -> Result<String, String> {
    Ok(STANDARD.encode(bytes))
}

/// The fields of a message.
fn fields(mut bytes: &[u8]) -> Result<Vec<Field<'_>>, String> {
    let cut = || "the protobuf message ends in the middle of a field".to_owned();
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes).ok_or_else(cut)?;
        let content = match tag & 7 {
            0 => Content::Number(varint(&mut bytes).ok_or_else(cut)?),
            kind @ (1 | 2 | 5) => {
                let length = match kind {
                    1 => 8,
                    5 => 4,
                    _ => varint(&mut bytes).ok_or_else(cut)?,
                };
                let length = usize::try_from(length).map_err(|_| cut())?;
                let (content, rest) = bytes.split_at_checked(length).ok_or_else(cut)?;
                bytes = rest;
                Content::Bytes(content)
            }
            other => {
                return Err(format!(
                    "the protobuf message has a field of unknown type {other}"
                ));
            }
        };
        found.push((tag >> 3, content));
    }
    Ok(found)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0_u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A field with content: number, then the bytes.
    fn field(number: u8, content: &[u8]) -> Vec<u8> {
        let length = u8::try_from(content.len()).unwrap();
        [&[number << 3 | 2, length], content].concat()
    }

    fn secret() -> Vec<u8> {
        let type_meta = [field(1, b"v1"), field(2, b"Secret")].concat();
        let label = [field(1, b"app"), field(2, b"web")].concat();
        let metadata = [field(1, b"s"), field(11, &label)].concat();
        let entry = [field(1, b"a"), field(2, &[0xff, 0])].concat();
        let raw = [field(1, &metadata), field(2, &entry), vec![5 << 3, 1]].concat();
        [MAGIC.to_vec(), field(1, &type_meta), field(2, &raw)].concat()
    }

    #[test]
    fn a_secret_reads_as_its_json() {
        let metadata = json!({"name": "s", "labels": {"app": "web"}});
        assert_eq!(
            read(&secret()).unwrap(),
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": {"a": "/wA="}, "immutable": true})
        );
    }

    #[test]
    fn a_message_cut_anywhere_is_refused_or_shorter_but_never_a_panic() {
        let whole = secret();
        for end in 0..whole.len() {
            let _ = read(&whole[..end]);
        }
        let endless = [MAGIC, &[0xff; 32]].concat();
        assert!(read(&endless).is_err());
        let huge = [MAGIC, &[2 << 3 | 2, 0xff, 0xff, 0xff, 0xff, 0x0f]].concat();
        assert!(read(&huge).is_err());
    }
}

//! `freehold delete`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use kube::api::DynamicObject;

use crate::commands::get::find_kind;
use crate::connect::Connection;
use crate::{manifests, sync};

/// Settings of `freehold delete`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Kind and names, such as: modeldeployment smollm2
    #[arg(value_name = "KIND NAME", conflicts_with = "filename")]
    pub what: Vec<String>,
    /// Delete what a file, a folder or - (standard input) describes
    #[arg(short, long, value_name = "PATH")]
    pub filename: Vec<PathBuf>,
    /// The API.
    #[command(flatten)]
    pub connection: Connection,
}

/// Deletes objects.
///
/// # Errors
/// When nothing is named, or the API refuses.
pub async fn run(arguments: Arguments) -> Result<()> {
    let (client, namespace) = arguments.connection.client().await?;
    let mut objects: Vec<DynamicObject> = Vec::new();
    for path in &arguments.filename {
        objects.extend(manifests::read(path)?.into_iter().map(|manifest| manifest.object));
    }
    if let Some((kind, names)) = arguments.what.split_first() {
        let (resource, _) = find_kind(&client, kind).await?;
        for name in names {
            let mut object = DynamicObject::new(name, &resource);
            object.metadata.namespace = Some(namespace.clone());
            objects.push(object);
        }
    }
    if objects.is_empty() {
        bail!("name what to delete: freehold delete KIND NAME, or freehold delete -f PATH");
    }
    for object in &objects {
        let word = if sync::delete(&client, object, &namespace).await? {
            "deleted"
        } else {
            "was not there"
        };
        println!("{} {word}", manifests::title(object));
    }
    Ok(())
}

//! What is written in the repository is what the code says: CRDs and examples.

use std::path::PathBuf;

use freehold::manifests;
use freehold::sync;
use freehold_control_plane::{ControlPlane, Options};

fn root() -> PathBuf {
    freehold_tests::folder()
        .parent()
        .expect("tests/ lies in the root")
        .to_owned()
}

#[test]
fn the_written_crds_are_those_of_the_types() {
    for crd in freehold_crds::all() {
        let path = root()
            .join("crds/yaml")
            .join(format!("{}.yaml", crd.spec.names.plural));
        let written = std::fs::read_to_string(&path).unwrap_or_default();
        let body = serde_yaml::to_string(&crd).unwrap();
        assert!(
            written.ends_with(&body),
            "{} is out of date: run `just crds`",
            path.display()
        );
    }
}

#[tokio::test]
async fn every_example_is_accepted_strictly() {
    let options = Options {
        data_dir: None,
        crds: freehold_crds::all(),
    };
    let control_plane = ControlPlane::open(options).unwrap();
    let all = manifests::read(&root().join("manifests/examples")).unwrap();
    assert!(all.len() >= 3, "{} examples", all.len());
    for manifest in all {
        let outcome = sync::apply(&control_plane.client(), &manifest, "default", true).await;
        assert!(outcome.is_ok(), "{:#}", outcome.unwrap_err());
    }
    control_plane.shutdown();
}

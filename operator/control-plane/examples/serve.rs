//! Serves the API alone, for trying kubectl on it: `cargo run -p freehold-control-plane --example serve -- DIR [PORT]`.

use std::net::SocketAddr;
use std::path::PathBuf;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = PathBuf::from(arguments.next().ok_or("usage: serve DIR [PORT]")?);
    let port: u16 = arguments.next().map_or(Ok(0), |text| text.parse())?;
    let options = freehold_control_plane::Options {
        data_dir: Some(folder.clone()),
        crds: freehold_crds::all(),
    };
    let control_plane = freehold_control_plane::ControlPlane::open(options)?;
    let server = control_plane
        .serve(SocketAddr::from(([127, 0, 0, 1], port)), &folder)
        .await?;
    eprintln!("export KUBECONFIG={}", server.kubeconfig().display());
    tokio::signal::ctrl_c().await?;
    server.shutdown().await;
    Ok(())
}

//! `freehold key`.

use clap::Args;
use rand::RngCore;
use sha2::{Digest, Sha256};

/// Settings of `freehold key`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Who will hold the key
    pub name: String,
}

/// 256 random bits: nobody guesses it, so a plain hash is enough to keep it.
const KEY_BYTES: usize = 32;

/// Prints a new key and what a policy needs of it.
pub fn run(arguments: &Arguments) {
    let mut bytes = [0; KEY_BYTES];
    rand::rng().fill_bytes(&mut bytes);
    let key = format!("fh-{}", hex::encode(bytes));
    let digest = hex::encode(Sha256::digest(key.as_bytes()));
    println!("The key, for its holder; it is shown this once and kept nowhere:\n\n  {key}\n");
    println!(
        "For spec.access.keys of a GovernancePolicy:\n\n    - name: {}\n      sha256: {digest}",
        arguments.name
    );
}

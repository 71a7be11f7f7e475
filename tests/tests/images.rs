//! The images' own tests, which are in Python as what builds them is: see `manifests/images`.

use std::process::Command;

#[test]
fn images_are_valid_and_the_same_twice() {
    let root = freehold_tests::folder();
    let output = Command::new("python3")
        .arg(root.join("images/test_images.py"))
        .output()
        .expect("python3 runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    // What could not be tested here is told with its reason.
    for line in said.lines().filter(|line| line.contains("skipped")) {
        eprintln!("{line}");
    }
}

#[test]
fn dockerfiles_read_as_buildkit_reads_them() {
    freehold_tests::go::test("images/dockerfile");
}

//! Tests in Python, as what they test is: what builds the images (`manifests/images`), and what fetches the tests' parts.

use std::process::Command;

fn python(file: &str) {
    let output = Command::new("python3")
        .arg(freehold_tests::folder().join(file))
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
fn images_are_valid_and_the_same_twice() {
    python("images/test_images.py");
}

#[test]
fn parts_are_pinned_and_borrowed_where_they_do_not_run() {
    python("cluster/test_parts.py");
}

#[test]
fn dockerfiles_read_as_buildkit_reads_them() {
    freehold_tests::go::test("images/dockerfile");
}

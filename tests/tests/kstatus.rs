//! What tools judge objects by, over statuses that this code wrote: kstatus, the library behind Flux (`tests/chart/kstatus`),
//! and Flux's expressions and Argo CD's scripts of `manifests/` by these tools' own evaluators (`tests/chart/health`).

#[test]
fn kstatus_judges_every_phase_as_it_is() {
    freehold_tests::go::test("chart/kstatus");
}

#[test]
fn flux_and_argo_cd_judge_every_phase_as_it_is() {
    freehold_tests::go::test("chart/health");
}

//! kstatus, the library that Flux judges objects by, over statuses that this code wrote: see `tests/chart/kstatus`.

#[test]
fn kstatus_judges_every_phase_as_it_is() {
    freehold_tests::go::test("chart/kstatus");
}

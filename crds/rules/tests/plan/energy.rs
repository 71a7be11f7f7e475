//! What a deployment draws, in its status.

use freehold_crds::Device;
use freehold_crds::energy::{EnergyMeter, EnergyUse};
use freehold_crds::inference_node::{Instance, Phase};

use crate::build::{World, deployment, instance, node, path};

fn measured(meter: EnergyMeter, energy: Option<EnergyUse>) -> World {
    let mut machine = node("a", 2048, false);
    machine.status.energy = Some(meter);
    let mut world = World::new(
        vec![deployment("chat", 0, path("/a.gguf", Some(100)))],
        vec![machine],
    );
    world.agents = Box::new(move |assignment| Instance {
        device: Some(Device::Cpu),
        energy,
        ..instance(assignment, Phase::Ready)
    });
    world.settle();
    world
}

#[test]
fn joules_and_money_are_told_where_they_are_measured() {
    let meter = EnergyMeter {
        price_per_kilowatt_hour: Some("0.36".to_owned()),
        currency: Some("EUR".to_owned()),
        ..EnergyMeter::default()
    };
    let energy = Some(EnergyUse {
        joules: 900,
        tokens: 3000,
    });
    let report = measured(meter, energy).status("chat").energy.unwrap();
    assert_eq!(
        report.summary.as_deref(),
        Some("300 kJ and 0.0300 EUR per million tokens")
    );
    assert_eq!(report.reason, None);
}

#[test]
fn a_machine_without_counters_gives_a_reason_in_place_of_figures() {
    let meter = EnergyMeter {
        reason: Some("the processor shows no energy counter".to_owned()),
        ..EnergyMeter::default()
    };
    let report = measured(meter, None).status("chat").energy.unwrap();
    assert_eq!(
        report.reason.as_deref(),
        Some("a: the processor shows no energy counter")
    );
    assert_eq!((report.summary, report.joules), (None, None));
}

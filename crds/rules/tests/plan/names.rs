//! Who is served under which name.

use crate::build::{World, deployment, node, path};

fn two(aliases: [&[&str]; 2]) -> World {
    let mut older = deployment("older", 100, path("/a.gguf", Some(100)));
    let mut younger = deployment("younger", 0, path("/b.gguf", Some(100)));
    older.spec.aliases = aliases[0].iter().map(|&name| name.to_owned()).collect();
    younger.spec.aliases = aliases[1].iter().map(|&name| name.to_owned()).collect();
    World::new(vec![younger, older], vec![node("a", 2048, false)])
}

fn routes(world: &World) -> Vec<(String, String)> {
    let routes = world.input.nodes[0].spec.routes.iter();
    routes
        .map(|route| (route.name.clone(), route.deployment.clone()))
        .collect()
}

fn owned(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs
        .iter()
        .map(|&(name, deployment)| (name.to_owned(), deployment.to_owned()))
        .collect()
}

#[test]
fn a_taken_alias_is_withheld_and_the_other_names_are_served_on() {
    let mut world = two([&["gpt"], &["mine"]]);
    world.settle();
    world.edit("younger", |spec| spec.aliases.push("gpt".to_owned()));
    world.settle();
    assert_eq!(
        routes(&world),
        owned(&[
            ("gpt", "older"),
            ("mine", "younger"),
            ("older", "older"),
            ("younger", "younger")
        ])
    );
    let status = world.status("younger");
    assert_eq!(status.ready_replicas, 1);
    assert_eq!(status.names, ["younger", "mine"]);
    let (stalled, message) = world.condition("younger", "Stalled").unwrap();
    assert_eq!(stalled, "True NameTaken");
    assert_eq!(
        message,
        "1 of 1 replicas serve as younger, mine; the name \"gpt\" belongs to default/older, which is older; rename this deployment or its alias"
    );
    assert_eq!(world.condition("younger", "Ready").unwrap().0, "False NameTaken");
    // Mended, and all is well.
    world.edit("younger", |spec| spec.aliases.truncate(1));
    world.settle();
    assert_eq!(world.condition("younger", "Ready").unwrap().0, "True Serving");
    assert_eq!(world.condition("younger", "Stalled"), None);
}

#[test]
fn a_deployment_without_any_name_left_is_not_placed() {
    let mut world = two([&["younger"], &[]]);
    world.settle();
    assert_eq!(routes(&world), owned(&[("older", "older"), ("younger", "older")]));
    assert_eq!(world.models("a"), ["/a.gguf"]);
    assert_eq!(world.condition("younger", "Stalled").unwrap().0, "True NameTaken");
}

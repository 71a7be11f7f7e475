//! Who may reach whom, by the NetworkPolicies that the chart and the overlays render.
//!
//! The objects are judged here as Kubernetes's documents say that a network must judge them. No network enforces them in
//! these tests: the CNI plugins that the tests' nodes have know no policies.

use std::net::IpAddr;

use freehold_tests::api_server::{ApiServer, Storage};
use freehold_tests::named::is_named;
use freehold_tests::person::{Person, chart, objects};
use serde_json::{Value, json};

/// Somebody on the network.
#[derive(Clone, Copy)]
struct Party {
    about: &'static str,
    address: &'static str,
    pod: Option<Pod>,
}

#[derive(Clone, Copy)]
struct Pod {
    namespace: &'static str,
    labels: &'static [(&'static str, &'static str)],
    /// Names of its ports.
    ports: &'static [(&'static str, u16)],
}

const fn own(
    component: &'static [(&'static str, &'static str)],
    ports: &'static [(&'static str, u16)],
) -> Option<Pod> {
    Some(Pod {
        namespace: "freehold-system",
        labels: component,
        ports,
    })
}

const fn outside(about: &'static str, address: &'static str) -> Party {
    Party {
        about,
        address,
        pod: None,
    }
}

const NAME: (&str, &str) = ("app.kubernetes.io/name", "freehold");
const RELEASE: (&str, &str) = ("app.kubernetes.io/instance", "freehold");
const AGENT: Party = Party {
    about: "an agent",
    address: "10.42.0.7",
    pod: own(
        &[NAME, RELEASE, ("app.kubernetes.io/component", "node-agent")],
        &[("gateway", 11480), ("metrics", 11481)],
    ),
};
const OTHER_AGENT: Party = Party {
    about: "another agent",
    address: "10.42.1.7",
    ..AGENT
};
const OPERATOR: Party = Party {
    about: "the operator",
    address: "10.42.0.8",
    pod: own(
        &[NAME, RELEASE, ("app.kubernetes.io/component", "operator")],
        &[("metrics", 8080)],
    ),
};
const TEST: Party = Party {
    about: "helm test",
    address: "10.42.0.9",
    pod: own(&[NAME, RELEASE, ("app.kubernetes.io/component", "test")], &[]),
};
const SHOP: Party = Party {
    about: "somebody's pod",
    address: "10.42.0.20",
    pod: Some(Pod {
        namespace: "shop",
        labels: &[("app", "web")],
        ports: &[],
    }),
};
const PROMETHEUS: Party = Party {
    about: "Prometheus",
    address: "10.42.0.21",
    pod: Some(Pod {
        namespace: "monitoring",
        labels: &[("app", "prometheus")],
        ports: &[],
    }),
};
const NAMES: Party = Party {
    about: "the cluster's names",
    address: "10.42.0.22",
    pod: Some(Pod {
        namespace: "kube-system",
        labels: &[("k8s-app", "kube-dns")],
        ports: &[],
    }),
};
const SERVER: Party = outside("the API server", "192.168.1.10");
const SERVER_AS_SERVICE: Party = outside("the API server's Service", "10.43.0.1");
const PUBLIC_SERVER: Party = outside("an API server with a public address", "203.0.113.10");
const HOST_AGENT: Party = outside("a host agent", "192.168.1.30");
const MIRROR: Party = outside("a mirror in the house", "192.168.1.20");
const INTERNET: Party = outside("the internet", "198.51.100.1");
const INTERNET6: Party = outside("the internet by IPv6", "2001:db8::1");

fn within(cidr: &str, address: &str) -> bool {
    let (network, length) = cidr.split_once('/').unwrap();
    let length: u32 = length.parse().unwrap();
    let [network, address] = [network, address].map(|text| text.parse::<IpAddr>().unwrap());
    let bits = |address: IpAddr| match address {
        IpAddr::V4(address) => (u128::from(address.to_bits()) << 96, 32),
        IpAddr::V6(address) => (address.to_bits(), 128),
    };
    let ((network, whole), (address, of)) = (bits(network), bits(address));
    assert!(length <= whole, "{cidr}");
    whole == of && (length == 0 || (network ^ address) >> (128 - length) == 0)
}

/// Whether a label selector of matchLabels selects; any other kind of selector is none of ours.
fn selects(selector: &Value, labels: &[(&str, &str)]) -> bool {
    assert!(
        selector
            .as_object()
            .unwrap()
            .keys()
            .all(|key| key == "matchLabels"),
        "{selector}"
    );
    let wanted = selector["matchLabels"].as_object().into_iter().flatten();
    wanted
        .into_iter()
        .all(|(key, value)| labels.contains(&(key.as_str(), value.as_str().unwrap())))
}

fn is_peer(peer: &Value, party: Party, namespace: &str) -> bool {
    if let Some(block) = peer.get("ipBlock") {
        let excepted = block["except"].as_array().into_iter().flatten();
        let inside = |cidr: &Value| within(cidr.as_str().unwrap(), party.address);
        return inside(&block["cidr"]) && !excepted.into_iter().any(inside);
    }
    let Some(pod) = party.pod else { return false };
    let here = match peer.get("namespaceSelector") {
        Some(selector) => selects(selector, &[("kubernetes.io/metadata.name", pod.namespace)]),
        None => pod.namespace == namespace,
    };
    here && peer
        .get("podSelector")
        .is_none_or(|selector| selects(selector, pod.labels))
}

fn is_port(wanted: &Value, to: Party, protocol: &str, port: u16) -> bool {
    let named = |name: &str| to.pod.is_some_and(|pod| pod.ports.contains(&(name, port)));
    wanted["protocol"].as_str().unwrap_or("TCP") == protocol
        && match &wanted["port"] {
            Value::Null => true,
            Value::String(name) => named(name),
            number => number == port,
        }
}

/// Whether the side of `pod` that these rules are about lets it through: what no policy selects is open.
fn lets(
    policies: &[Value],
    pod: Pod,
    direction: &str,
    peers: &str,
    fits: &dyn Fn(&Value, &str) -> bool,
) -> bool {
    let over = |policy: &&Value| {
        let types = policy["spec"]["policyTypes"].as_array().unwrap();
        policy["metadata"]["namespace"] == pod.namespace
            && selects(&policy["spec"]["podSelector"], pod.labels)
            && types.contains(&json!(direction))
    };
    let mut over = policies.iter().filter(over).peekable();
    if over.peek().is_none() {
        return true;
    }
    over.any(|policy| {
        let rules = policy["spec"][direction.to_lowercase()]
            .as_array()
            .into_iter()
            .flatten();
        rules.into_iter().any(|rule| {
            assert!(
                rule.as_object()
                    .unwrap()
                    .keys()
                    .all(|key| key == peers || key == "ports"),
                "{rule}"
            );
            fits(rule, pod.namespace)
        })
    })
}

fn reaches(policies: &[Value], from: Party, to: Party, protocol: &str, port: u16) -> bool {
    let through = |key: &str, other: Party, rule: &Value, namespace: &str| {
        // Absent or empty: everybody, every port.
        let any = |list: &Value| list.as_array().is_none_or(Vec::is_empty);
        let listed = |list: &Value, fits: &dyn Fn(&Value) -> bool| {
            any(list) || list.as_array().unwrap().iter().any(fits)
        };
        listed(&rule[key], &|peer| is_peer(peer, other, namespace))
            && listed(&rule["ports"], &|wanted| is_port(wanted, to, protocol, port))
    };
    let out = from.pod.is_none_or(|pod| {
        lets(policies, pod, "Egress", "to", &|rule, namespace| {
            through("to", to, rule, namespace)
        })
    });
    let into = to.pod.is_none_or(|pod| {
        lets(policies, pod, "Ingress", "from", &|rule, namespace| {
            through("from", from, rule, namespace)
        })
    });
    out && into
}

fn policies(objects: Vec<Value>) -> Vec<Value> {
    let found: Vec<_> = objects
        .into_iter()
        .filter(|object| object["kind"] == "NetworkPolicy")
        .collect();
    assert!(found.len() > 2);
    found
}

fn template(person: &Person, more: &[&str], values: &str) -> Vec<Value> {
    let chart = chart();
    let mut arguments = vec![
        "template",
        "freehold",
        chart.to_str().unwrap(),
        "--namespace",
        "freehold-system",
    ];
    arguments.extend(more);
    policies(objects(&person.helm(&arguments, values).unwrap()))
}

fn overlay(name: &str) -> Vec<Value> {
    let folder = chart().join("../../manifests").join(name);
    let said = Person::new(None).kubectl(&["kustomize", folder.to_str().unwrap()], "");
    policies(objects(&said.unwrap()))
}

/// What is so whatever the values: from, to, port, whether.
const ALWAYS: &[(Party, Party, u16, bool)] = &[
    (AGENT, OTHER_AGENT, 11480, true),
    (AGENT, OTHER_AGENT, 11481, false),
    (AGENT, OPERATOR, 8080, false),
    (AGENT, SHOP, 8080, false),
    (AGENT, SERVER, 6443, true),
    (AGENT, SERVER, 22, false),
    (AGENT, SERVER_AS_SERVICE, 443, true),
    (AGENT, INTERNET, 80, false),
    (AGENT, INTERNET, 6443, false),
    (AGENT, INTERNET, 11480, false),
    (OPERATOR, SERVER, 6443, true),
    (OPERATOR, SERVER_AS_SERVICE, 443, true),
    (OPERATOR, INTERNET, 443, false),
    (OPERATOR, INTERNET, 6443, false),
    (OPERATOR, INTERNET6, 443, false),
    (OPERATOR, AGENT, 11480, false),
    (OPERATOR, SHOP, 8080, false),
    (TEST, OPERATOR, 8080, true),
    (TEST, AGENT, 11480, true),
    (TEST, SERVER, 6443, false),
    (TEST, INTERNET, 443, false),
    (SHOP, AGENT, 22, false),
    (SHOP, OPERATOR, 9090, false),
    (SHOP, TEST, 80, false),
    (INTERNET, OPERATOR, 8080, false),
    (INTERNET, AGENT, 11481, false),
    (PROMETHEUS, OPERATOR, 8080, true),
    (PROMETHEUS, AGENT, 11481, true),
];

fn hold(about: &str, policies: &[Value], cases: &[(Party, Party, u16, bool)]) {
    let wrong: Vec<String> = cases
        .iter()
        .filter(|(from, to, port, may)| reaches(policies, *from, *to, "TCP", *port) != *may)
        .map(|(from, to, port, may)| {
            let word = if *may { "cannot reach" } else { "reaches" };
            format!("{about}: {} {word} {} on {port}", from.about, to.about)
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn nothing_is_open_but_what_is_listed() {
    let person = Person::new(None);
    let with = |values: &str| template(&person, &[], values);
    let matrix: &[(&str, &[(Party, Party, u16, bool)])] = &[
        (
            "",
            &[
                (AGENT, INTERNET, 443, true),
                (AGENT, INTERNET6, 443, true),
                // That is what where helm cannot ask stands for, and docs/install.md says so.
                (AGENT, MIRROR, 443, true),
                (AGENT, SHOP, 443, true),
                (OPERATOR, MIRROR, 443, true),
                (AGENT, HOST_AGENT, 11480, false),
                (AGENT, SHOP, 11480, false),
                (SHOP, AGENT, 11480, true),
                (INTERNET, AGENT, 11480, true),
            ],
        ),
        (
            "networkPolicy: {modelSources: []}",
            &[(AGENT, INTERNET, 443, false), (AGENT, INTERNET6, 443, false)],
        ),
        (
            "networkPolicy: {modelSources: [{cidr: 192.168.1.20/32, ports: [8443]}], apiServer: {cidrs: [192.168.1.10/32, 10.43.0.1/32]}}",
            &[
                (AGENT, MIRROR, 8443, true),
                (AGENT, MIRROR, 443, false),
                (OPERATOR, MIRROR, 8443, false),
                (OPERATOR, MIRROR, 443, false),
                (AGENT, SHOP, 443, false),
                (AGENT, INTERNET, 443, false),
            ],
        ),
        (
            "hostAgents: [mac-mini]",
            &[(AGENT, HOST_AGENT, 11480, true), (AGENT, HOST_AGENT, 22, false)],
        ),
        (
            "nodeAgent: {pools: {default: {}, gpu: {hostNetwork: true}}}",
            &[(AGENT, HOST_AGENT, 11480, true), (TEST, HOST_AGENT, 11480, true)],
        ),
        (
            "networkPolicy: {gatewayPeers: {cidrs: [192.168.1.30/32], ports: [11480, 8000]}}",
            &[
                (AGENT, HOST_AGENT, 8000, true),
                (AGENT, HOST_AGENT, 11480, true),
                (AGENT, MIRROR, 11480, false),
                (OPERATOR, HOST_AGENT, 11480, false),
            ],
        ),
        (
            "networkPolicy: {clients: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: monitoring}}}], gatewayPeers: {cidrs: [192.168.1.30/32]}}",
            &[
                (PROMETHEUS, AGENT, 11480, true),
                (SHOP, AGENT, 11480, false),
                (INTERNET, AGENT, 11480, false),
                (HOST_AGENT, AGENT, 11480, true),
                (HOST_AGENT, AGENT, 11481, false),
                (MIRROR, AGENT, 11480, false),
            ],
        ),
        (
            "networkPolicy: {metricsFrom: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: monitoring}}}]}",
            &[(SHOP, OPERATOR, 8080, false), (SHOP, AGENT, 11481, false)],
        ),
    ];
    for (values, cases) in matrix {
        let policies = with(values);
        hold(values, &policies, ALWAYS);
        hold(values, &policies, cases);
        for party in [AGENT, OPERATOR] {
            assert!(
                reaches(&policies, party, NAMES, "UDP", 53),
                "{values}: {}",
                party.about
            );
            assert!(
                !reaches(&policies, party, SHOP, "UDP", 53),
                "{values}: {}",
                party.about
            );
        }
    }
}

#[test]
fn kustomize_leaves_the_house_only_where_it_says_so() {
    let base = overlay("base");
    hold("base", &base, ALWAYS);
    hold(
        "base",
        &base,
        &[
            (AGENT, INTERNET, 443, true),
            (AGENT, PUBLIC_SERVER, 6443, false),
            (AGENT, HOST_AGENT, 11480, false),
        ],
    );
    let closed = overlay("overlays/air-gapped");
    hold("air-gapped", &closed, ALWAYS);
    hold(
        "air-gapped",
        &closed,
        &[
            (AGENT, INTERNET, 443, false),
            (AGENT, INTERNET6, 443, false),
            (AGENT, MIRROR, 443, true),
        ],
    );
    hold("host agents", &overlay("overlays/host-agents"), ALWAYS);
}

/// Where helm can ask, the API server is where the cluster says that it is, and nowhere else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn helm_asks_the_cluster_where_its_api_server_is() {
    if is_named() {
        println!("skipped: a named cluster's API server is where it is");
        return;
    }
    let server = ApiServer::start(Storage::Etcd).await.unwrap();
    let person = Person::new(Some(server.kubeconfig()));
    let ask = |values: &str| {
        template(
            &person,
            &["--dry-run=server", "--set", "crds.install=false"],
            values,
        )
    };
    let slice = |addresses: &[&str], port: u16| {
        let family = if addresses[0].contains(':') {
            "IPv6"
        } else {
            "IPv4"
        };
        let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
            "metadata": {"name": "kubernetes", "namespace": "default",
                "labels": {"kubernetes.io/service-name": "kubernetes"}},
            "endpoints": [{"addresses": addresses}], "ports": [{"name": "https", "port": port}]});
        person
            .kubectl(&["replace", "--force", "-f", "-"], &slice.to_string())
            .unwrap();
    };
    hold(
        "nothing is known",
        &ask(""),
        &[
            (OPERATOR, MIRROR, 443, true),
            (OPERATOR, PUBLIC_SERVER, 6443, false),
        ],
    );
    slice(&["203.0.113.10"], 6443);
    let found = ask("networkPolicy: {modelSources: []}");
    let only: &[_] = &[
        (OPERATOR, PUBLIC_SERVER, 6443, true),
        (OPERATOR, PUBLIC_SERVER, 443, false),
        (OPERATOR, MIRROR, 443, false),
        (OPERATOR, MIRROR, 6443, false),
        (AGENT, PUBLIC_SERVER, 6443, true),
        (AGENT, SHOP, 443, false),
        (AGENT, INTERNET, 443, false),
    ];
    hold("a public address", &found, only);
    // The Service's own address too, for networks that look before they translate.
    let service = person.get(&["service", "kubernetes", "-n", "default"]).remove(0);
    let address = service["spec"]["clusterIP"].as_str().unwrap().to_owned().leak();
    hold(
        "a public address",
        &found,
        &[(AGENT, outside("the Service", address), 443, true)],
    );
    slice(&["2001:db8::1"], 16443);
    hold(
        "IPv6",
        &ask(""),
        &[
            (OPERATOR, INTERNET6, 16443, true),
            (OPERATOR, INTERNET6, 443, false),
        ],
    );
    let own = ask("networkPolicy: {apiServer: {cidrs: [192.168.1.10/32]}}");
    hold(
        "networks of one's own",
        &own,
        &[
            (OPERATOR, SERVER, 6443, true),
            (OPERATOR, INTERNET6, 16443, false),
        ],
    );
}

//! Watches: slow ones, streaming lists, reflectors, a controller, bookmarks, shutdown.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::{WatchStreamExt, reflector, watcher};
use serde_json::{Value, json};

use crate::support::{DEADLINE, Served, eventually, in_memory, refusal, widget, widget_resource, widgets};

async fn make(api: &Api<DynamicObject>, name: &str) -> DynamicObject {
    api.create(&PostParams::default(), &widget(name, &json!({"color": "red"})))
        .await
        .unwrap()
}

async fn resize(api: &Api<DynamicObject>, name: &str, size: usize) {
    let patch = Patch::Merge(json!({"spec": {"size": size % 100 + 1}}));
    api.patch(name, &PatchParams::default(), &patch).await.unwrap();
}

/// More changes than the server remembers.
const FORGOTTEN: usize = 1200;

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_falls_behind_is_told_410_and_ended() {
    let control_plane = in_memory();
    let api = widgets(&control_plane.client());
    let made = make(&api, "w").await;
    let revision = made.resource_version().unwrap();
    let mut slow = api
        .watch(&WatchParams::default(), &revision)
        .await
        .unwrap()
        .boxed();
    resize(&api, "w", 1).await;
    assert!(matches!(
        slow.try_next().await.unwrap(),
        Some(WatchEvent::Modified(_))
    ));
    for size in 0..FORGOTTEN {
        resize(&api, "w", size).await;
    }
    let mut last = None;
    while let Some(event) = tokio::time::timeout(DEADLINE, slow.try_next())
        .await
        .unwrap()
        .unwrap()
    {
        last = Some(event);
    }
    let Some(WatchEvent::Error(status)) = last else {
        panic!("the watch ended without an error: {last:?}");
    };
    assert_eq!((status.code, status.reason.as_str()), (410, "Expired"));
    // Whoever asks for what is forgotten is told the same at once.
    let mut late = api
        .watch(&WatchParams::default(), &revision)
        .await
        .unwrap()
        .boxed();
    assert!(matches!(late.try_next().await.unwrap(), Some(WatchEvent::Error(status)) if status.code == 410));
}

/// A client that stops reading costs the server nothing, and gets right again by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_reflector_that_fell_behind_recovers() {
    let served = Served::start().await;
    let client = kube_client(&served).await;
    let api = widgets(&client);
    make(&api, "w").await;
    let writer = reflector::store::Writer::<DynamicObject>::new(widget_resource());
    let reader = writer.as_reader();
    let mut stream = watcher(api.clone(), watcher::Config::default())
        .default_backoff()
        .reflect(writer)
        .boxed();
    while reader.state().is_empty() {
        tokio::time::timeout(DEADLINE, stream.try_next())
            .await
            .unwrap()
            .unwrap();
    }
    let local = widgets(&served.control_plane.client());
    for size in 0..FORGOTTEN {
        resize(&local, "w", size).await;
    }
    make(&local, "last").await;
    let caught_up = async {
        while reader.state().len() < 2 {
            // An error is the 410; the stream goes on with a new list.
            let _ = stream.next().await;
        }
    };
    tokio::time::timeout(DEADLINE, caught_up).await.unwrap();
    let found = reader.find(|object| object.name_any() == "w").unwrap();
    assert_eq!(
        found.resource_version(),
        local.get("w").await.unwrap().resource_version()
    );
}

#[tokio::test]
async fn a_streaming_list_says_when_it_has_told_all() {
    let control_plane = in_memory();
    let api = widgets(&control_plane.client());
    for name in ["a", "b"] {
        make(&api, name).await;
    }
    let mut stream = watcher(api.clone(), watcher::Config::default().streaming_lists()).boxed();
    let mut names = Vec::new();
    loop {
        match tokio::time::timeout(DEADLINE, stream.try_next())
            .await
            .unwrap()
            .unwrap()
            .unwrap()
        {
            watcher::Event::Init => {}
            watcher::Event::InitApply(object) => names.push(object.name_any()),
            watcher::Event::InitDone => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(names, ["a", "b"]);
    make(&api, "c").await;
    let next = tokio::time::timeout(DEADLINE, stream.try_next())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(matches!(next, watcher::Event::Apply(object) if object.name_any() == "c"));
    api.delete("a", &DeleteParams::default()).await.unwrap();
    let next = tokio::time::timeout(DEADLINE, stream.try_next())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(matches!(next, watcher::Event::Delete(object) if object.name_any() == "a"));
}

#[tokio::test]
async fn the_kinds_stream_too() {
    use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
    let control_plane = in_memory();
    let api: Api<CustomResourceDefinition> = Api::all(control_plane.client());
    for config in [
        watcher::Config::default(),
        watcher::Config::default().streaming_lists(),
    ] {
        let mut stream = watcher(api.clone(), config).applied_objects().boxed();
        let found = tokio::time::timeout(DEADLINE, stream.try_next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert_eq!(found.name_any(), "widgets.test.example.com");
    }
}

/// Time stands still but for the waiting, so a minute passes at once.
#[tokio::test(start_paused = true)]
async fn an_idle_watch_gets_bookmarks_that_move_on() {
    let control_plane = in_memory();
    let api = widgets(&control_plane.client());
    let made = make(&api, "w").await;
    let parameters = WatchParams::default().labels("none=such");
    let mut stream = api
        .watch(&parameters, &made.resource_version().unwrap())
        .await
        .unwrap()
        .boxed();
    resize(&api, "w", 7).await;
    let now = api.get("w").await.unwrap().resource_version().unwrap();
    let Some(WatchEvent::Bookmark(bookmark)) = stream.try_next().await.unwrap() else {
        panic!("expected a bookmark");
    };
    assert_eq!(
        bookmark.metadata.resource_version, now,
        "it tells of changes that the watch does not show"
    );
}

#[tokio::test(start_paused = true)]
async fn a_watch_ends_when_its_time_is_up() {
    let control_plane = in_memory();
    let api = widgets(&control_plane.client());
    let made = make(&api, "w").await;
    let parameters = WatchParams::default().timeout(10).disable_bookmarks();
    let begin = tokio::time::Instant::now();
    let stream = api
        .watch(&parameters, &made.resource_version().unwrap())
        .await
        .unwrap();
    let events: Vec<_> = stream.try_collect().await.unwrap();
    assert!(events.is_empty());
    assert_eq!(begin.elapsed().as_secs(), 10);
}

#[tokio::test]
async fn a_watch_from_the_future_is_refused() {
    let control_plane = in_memory();
    let api = widgets(&control_plane.client());
    let refused = refusal(api.watch(&WatchParams::default(), "999999").await.map(|_| ()));
    assert!(
        refused.code == 504 && refused.message.contains("Too large resource version"),
        "{refused:?}"
    );
    let refused = refusal(api.watch(&WatchParams::default(), "nonsense").await.map(|_| ()));
    assert_eq!(refused.code, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_reconciles_what_changes_and_then_rests() {
    let control_plane = in_memory();
    let client = control_plane.client();
    let api = widgets(&client);
    let runs = Arc::new(AtomicUsize::new(0));
    let context = Arc::new((api.clone(), Arc::clone(&runs)));
    let controller = Controller::new_with(api.clone(), watcher::Config::default(), widget_resource());
    let running = controller.run(
        |object, context| async move {
            context.1.fetch_add(1, Ordering::SeqCst);
            let color = object.data["spec"]["color"].clone();
            let status =
                json!({"apiVersion": "test.example.com/v1", "kind": "Widget", "metadata": {"name": object.name_any()}, "status": {"phase": color}});
            let parameters = PatchParams::apply("painter").force();
            context
                .0
                .patch_status(&object.name_any(), &parameters, &Patch::Apply(status))
                .await?;
            Ok::<_, kube::Error>(Action::await_change())
        },
        |_, _, _| Action::requeue(Duration::from_millis(50)),
        context,
    );
    let running = tokio::spawn(running.for_each(|_| std::future::ready(())));
    make(&api, "w").await;
    let phase = async || api.get("w").await.unwrap().data.pointer("/status/phase").cloned();
    eventually("the status is red", || async {
        (phase().await? == "red").then_some(())
    })
    .await;
    api.patch(
        "w",
        &PatchParams::default(),
        &Patch::Merge(json!({"spec": {"color": "blue"}})),
    )
    .await
    .unwrap();
    eventually("the status is blue", || async {
        (phase().await? == "blue").then_some(())
    })
    .await;
    // Its own status comes back to it once; that writes nothing, so it ends there.
    let still = async || {
        let before = (control_plane.revision(), runs.load(Ordering::SeqCst));
        tokio::time::sleep(Duration::from_millis(200)).await;
        (before == (control_plane.revision(), runs.load(Ordering::SeqCst))).then_some(())
    };
    eventually("it rests", still).await;
    running.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_ends_open_watches_and_the_port() {
    let served = Served::start().await;
    let client = kube_client(&served).await;
    let api = widgets(&client);
    let made = make(&api, "w").await;
    let mut open = Vec::new();
    for _ in 0..4 {
        let watch = api
            .watch(&WatchParams::default(), &made.resource_version().unwrap())
            .await
            .unwrap();
        open.push(tokio::spawn(watch.try_collect::<Vec<_>>()));
    }
    let address = served.server.address();
    let begin = std::time::Instant::now();
    served.server.shutdown().await;
    assert!(
        begin.elapsed() < Duration::from_secs(3),
        "it took {:?}",
        begin.elapsed()
    );
    for watch in open {
        tokio::time::timeout(DEADLINE, watch)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

/// A client of the port, as any other program has it.
async fn kube_client(served: &Served) -> kube::Client {
    let file = kube::config::Kubeconfig::read_from(served.server.kubeconfig()).unwrap();
    let config =
        kube::Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default()).await;
    kube::Client::try_from(config.unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn many_watches_see_the_same_order() {
    let control_plane = in_memory();
    let api = widgets(&control_plane.client());
    make(&api, "w").await;
    let collect = |api: Api<DynamicObject>| async move {
        let stream = watcher(api, watcher::Config::default()).applied_objects();
        let seen = stream.map_ok(|object| (object.resource_version(), object.data["spec"]["size"].clone()));
        let mut seen = seen.boxed();
        let mut all: Vec<(Option<String>, Value)> = Vec::new();
        while all.last().is_none_or(|(_, size)| *size != json!(100)) {
            all.push(seen.try_next().await.unwrap().unwrap());
        }
        all
    };
    let watchers: Vec<_> = (0..8).map(|_| tokio::spawn(collect(api.clone()))).collect();
    for size in 0..100 {
        resize(&api, "w", size).await;
    }
    let mut longest: Vec<(Option<String>, Value)> = Vec::new();
    for watcher in watchers {
        let seen = tokio::time::timeout(DEADLINE, watcher).await.unwrap().unwrap();
        let revisions: Vec<u64> = seen
            .iter()
            .map(|(revision, _)| revision.as_ref().unwrap().parse().unwrap())
            .collect();
        assert!(revisions.is_sorted(), "{revisions:?}");
        let shared = seen.len().min(longest.len());
        assert_eq!(seen[seen.len() - shared..], longest[longest.len() - shared..]);
        if seen.len() > longest.len() {
            longest = seen;
        }
    }
}

use super::*;

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn always() -> Watchdog {
    Watchdog::new(Activation::default(), 7)
}

fn on_demand(idle_seconds: u32) -> Watchdog {
    Watchdog::new(
        Activation {
            mode: ActivationMode::OnDemand,
            idle_seconds,
        },
        7,
    )
}

fn crash() -> Event {
    Event::Exited {
        how: "killed by signal 9".to_owned(),
        permanent: false,
    }
}

/// From the start to Ready at `now`.
fn ready(mut watchdog: Watchdog, now: Duration) -> Watchdog {
    assert_eq!(watchdog.step(now, Event::Begin), [Action::Fetch]);
    watchdog.step(now, Event::Activate);
    assert_eq!(watchdog.step(now, Event::Fetched), [Action::Reserve]);
    assert_eq!(watchdog.step(now, Event::Reserved), [Action::Load]);
    assert_eq!(watchdog.step(now, Event::Loaded), []);
    assert!(watchdog.run().is_some());
    watchdog
}

/// From a backoff to Ready; gives the time at which it was loaded.
fn recover(watchdog: &mut Watchdog) -> Duration {
    let until = watchdog.deadline().expect("a backoff has a deadline");
    assert_eq!(watchdog.step(until, Event::Tick), [Action::Reserve]);
    assert_eq!(watchdog.step(until, Event::Reserved), [Action::Load]);
    watchdog.step(until, Event::Loaded);
    until
}

#[test]
fn crashed_worker_comes_back_after_a_short_pause() {
    let mut watchdog = ready(always(), seconds(1));
    assert_eq!(watchdog.step(seconds(10), crash()), [Action::Release]);
    assert!(matches!(
        watchdog.stage(),
        Stage::Backoff {
            reason: "Crashed",
            ..
        }
    ));
    let back = recover(&mut watchdog);
    assert!(back > seconds(10) && back < seconds(11), "{back:?}");
    assert_eq!(watchdog.restarts(), 1);
    assert_eq!(watchdog.last_exit(), Some("killed by signal 9"));
}

#[test]
fn crash_loop_pauses_grow_to_a_bound_and_a_good_run_forgives() {
    let mut watchdog = ready(always(), seconds(0));
    let (mut now, mut pauses) = (seconds(1), Vec::new());
    for _ in 0..14 {
        watchdog.step(now, crash());
        let back = recover(&mut watchdog);
        pauses.push(back - now);
        now = back;
    }
    assert!(
        pauses.windows(2).take(8).all(|pair| pair[0] < pair[1]),
        "{pauses:?}"
    );
    assert!(pauses.iter().all(|pause| *pause <= seconds(375)), "{pauses:?}");
    assert!(*pauses.last().expect("pauses") >= seconds(225));
    now += GOOD_RUN;
    watchdog.step(now, crash());
    assert!(recover(&mut watchdog) - now < seconds(1));
}

#[test]
fn permanent_failure_is_not_tried_again() {
    let mut watchdog = always();
    watchdog.step(seconds(0), Event::Begin);
    watchdog.step(seconds(0), Event::Fetched);
    watchdog.step(seconds(0), Event::Reserved);
    let (reason, message) = ("InvalidModel".to_owned(), "no tensor output.weight".to_owned());
    watchdog.step(
        seconds(1),
        Event::GaveUp {
            reason,
            message: message.clone(),
        },
    );
    let exit = Event::Exited {
        how: "exit status 3".to_owned(),
        permanent: true,
    };
    assert_eq!(watchdog.step(seconds(1), exit), [Action::Release]);
    assert_eq!(
        watchdog.stage(),
        &Stage::Failed {
            reason: "InvalidModel".to_owned(),
            message
        }
    );
    assert_eq!(watchdog.deadline(), None);
    assert_eq!(watchdog.step(seconds(9999), Event::Tick), []);
}

#[test]
fn slow_work_is_left_alone_and_standing_still_is_not() {
    let mut watchdog = ready(always(), seconds(0));
    for minute in 1..60_u64 {
        // One step a minute: slow, and moving.
        for second in 0..60 {
            let now = seconds(minute * 60 + second);
            assert_eq!(
                watchdog.step(
                    now,
                    Event::Beat {
                        steps: minute,
                        busy: true
                    }
                ),
                []
            );
        }
    }
    let mut now = seconds(60 * 60);
    let mut killed = Vec::new();
    while killed.is_empty() && now < seconds(2 * 60 * 60) {
        now += seconds(1);
        killed = watchdog.step(
            now,
            Event::Beat {
                steps: 59,
                busy: true,
            },
        );
    }
    assert_eq!(killed, [Action::Kill]);
    assert!(matches!(
        watchdog.stage(),
        Stage::Stopping {
            then: Then::Restart { .. }
        }
    ));
    watchdog.step(now, crash());
    assert!(watchdog.last_exit().expect("an exit").contains("stood still"));
}

#[test]
fn rest_is_not_a_stall() {
    let mut watchdog = ready(always(), seconds(0));
    for beat in 1..1000 {
        assert_eq!(
            watchdog.step(
                seconds(beat * 5),
                Event::Beat {
                    steps: 3,
                    busy: false
                }
            ),
            []
        );
    }
    // Work begins after a long rest: the rest does not count.
    assert_eq!(
        watchdog.step(seconds(5000), Event::Beat { steps: 3, busy: true }),
        []
    );
    assert_eq!(
        watchdog.run().expect("a run").stalled_for(seconds(5001)),
        seconds(1)
    );
}

#[test]
fn frozen_worker_is_restarted() {
    let mut watchdog = ready(always(), seconds(0));
    let deadline = watchdog.deadline().expect("silence has a limit");
    assert_eq!(watchdog.step(deadline, Event::Tick), [Action::Kill]);
}

#[test]
fn removal_waits_for_requests_in_flight() {
    let mut watchdog = ready(always(), seconds(0));
    watchdog.step(seconds(10), Event::Remove);
    assert!(matches!(watchdog.stage(), Stage::Draining { .. }));
    assert_eq!(
        watchdog.step(
            seconds(12),
            Event::Traffic {
                in_flight: 2,
                last_request: None
            }
        ),
        []
    );
    assert_eq!(
        watchdog.step(
            seconds(13),
            Event::Traffic {
                in_flight: 0,
                last_request: None
            }
        ),
        [Action::Stop]
    );
    assert_eq!(watchdog.step(seconds(13), crash()), [Action::Release]);
    assert_eq!(watchdog.stage(), &Stage::Gone);
}

#[test]
fn removal_does_not_wait_for_ever() {
    let mut watchdog = ready(always(), seconds(0));
    watchdog.step(seconds(10), Event::Remove);
    assert_eq!(watchdog.step(seconds(39), Event::Tick), []);
    assert_eq!(watchdog.step(seconds(40), Event::Tick), [Action::Stop]);
}

#[test]
fn on_demand_sleeps_until_a_request_and_again_after_its_idle_time() {
    let mut watchdog = on_demand(60);
    watchdog.step(seconds(0), Event::Begin);
    assert_eq!(watchdog.step(seconds(1), Event::Fetched), []);
    assert_eq!(watchdog.stage(), &Stage::Asleep { message: None });
    assert!(watchdog.wakes_on_demand());
    assert_eq!(watchdog.step(seconds(2), Event::Activate), [Action::Reserve]);
    watchdog.step(seconds(2), Event::Reserved);
    watchdog.step(seconds(3), Event::Loaded);
    // A long request keeps it awake.
    let traffic = |in_flight, last| Event::Traffic {
        in_flight,
        last_request: Some(seconds(last)),
    };
    watchdog.step(seconds(100), traffic(1, 3));
    assert!(watchdog.run().is_some());
    watchdog.step(seconds(159), traffic(0, 100));
    assert!(watchdog.run().is_some());
    watchdog.step(seconds(160), traffic(0, 100));
    assert!(matches!(
        watchdog.stage(),
        Stage::Draining {
            then: Then::Sleep,
            ..
        }
    ));
    assert_eq!(watchdog.step(seconds(161), traffic(0, 100)), [Action::Stop]);
    assert_eq!(watchdog.step(seconds(161), crash()), [Action::Release]);
    assert_eq!(watchdog.stage(), &Stage::Asleep { message: None });
    assert_eq!((watchdog.restarts(), watchdog.last_exit()), (0, None));
}

#[test]
fn request_that_comes_while_it_falls_asleep_is_served() {
    let mut watchdog = ready(on_demand(1), seconds(0));
    watchdog.step(
        seconds(5),
        Event::Traffic {
            in_flight: 0,
            last_request: None,
        },
    );
    assert!(matches!(watchdog.stage(), Stage::Draining { .. }));
    watchdog.step(seconds(5), Event::Activate);
    assert!(watchdog.run().is_some(), "its worker is still there");
    watchdog.step(
        seconds(7),
        Event::Traffic {
            in_flight: 0,
            last_request: None,
        },
    );
    watchdog.step(
        seconds(8),
        Event::Traffic {
            in_flight: 0,
            last_request: None,
        },
    );
    assert!(matches!(watchdog.stage(), Stage::Stopping { .. }));
    watchdog.step(seconds(8), Event::Activate);
    assert_eq!(
        watchdog.step(seconds(9), crash()),
        [Action::Release, Action::Reserve]
    );
}

#[test]
fn memory_that_is_being_freed_is_waited_for_and_missing_memory_refused() {
    let mut watchdog = always();
    watchdog.step(seconds(0), Event::Begin);
    watchdog.step(seconds(0), Event::Fetched);
    let no = |freeing| Event::NoMemory {
        message: "needs 9, 5 are free".to_owned(),
        freeing,
    };
    watchdog.step(seconds(1), no(true));
    assert!(matches!(watchdog.stage(), Stage::Waiting { message: Some(_) }));
    assert_eq!(watchdog.step(seconds(2), Event::MemoryChanged), [Action::Reserve]);
    watchdog.step(seconds(2), no(false));
    assert!(matches!(watchdog.stage(), Stage::Refused { .. }));
    assert_eq!(watchdog.step(seconds(3), Event::MemoryChanged), [Action::Reserve]);
    assert_eq!(watchdog.step(seconds(3), Event::Reserved), [Action::Load]);
}

#[test]
fn failed_fetch_is_tried_again_and_a_wrong_digest_is_not() {
    let failed = |permanent| Event::FetchFailed {
        reason: "FetchFailed",
        message: "no route".to_owned(),
        permanent,
    };
    let mut watchdog = always();
    watchdog.step(seconds(0), Event::Begin);
    watchdog.step(seconds(1), failed(false));
    let until = watchdog.deadline().expect("a pause");
    assert_eq!(watchdog.step(until, Event::Tick), [Action::Fetch]);
    watchdog.step(until, failed(true));
    assert!(matches!(watchdog.stage(), Stage::Failed { .. }));
}

mod properties {
    use super::*;
    use proptest::prelude::*;

    fn any_event() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::Begin),
            Just(Event::Fetched),
            any::<bool>().prop_map(|permanent| Event::FetchFailed {
                reason: "FetchFailed",
                message: String::new(),
                permanent
            }),
            Just(Event::Reserved),
            any::<bool>().prop_map(|freeing| Event::NoMemory {
                message: String::new(),
                freeing
            }),
            Just(Event::MemoryChanged),
            Just(Event::Loaded),
            any::<bool>().prop_map(|permanent| Event::Exited {
                how: String::new(),
                permanent
            }),
            (0..4_u64, any::<bool>()).prop_map(|(steps, busy)| Event::Beat { steps, busy }),
            (0..2_usize).prop_map(|in_flight| Event::Traffic {
                in_flight,
                last_request: None
            }),
            Just(Event::Activate),
            Just(Event::Evict),
            any::<bool>().prop_map(|drain| Event::Restart {
                cause: String::new(),
                drain
            }),
            Just(Event::Remove),
            Just(Event::Tick),
        ]
    }

    proptest! {
        /// Whatever happens, at most one worker runs, and one that was told to go is never forgotten.
        #[test]
        fn never_two_workers(
            events in proptest::collection::vec((any_event(), 0..400_u64), 0..80),
            demand in any::<bool>(),
        ) {
            let mut watchdog = if demand { on_demand(5) } else { always() };
            let (mut now, mut running) = (0, false);
            for (event, pause) in events {
                now += pause;
                // Only a worker that runs can exit.
                if matches!(event, Event::Exited { .. }) {
                    if !running { continue; }
                    running = false;
                }
                for action in watchdog.step(seconds(now), event) {
                    match action {
                        Action::Load => {
                            prop_assert!(!running);
                            running = true;
                        }
                        Action::Stop | Action::Kill => prop_assert!(running),
                        _ => {}
                    }
                }
                let has_worker = matches!(
                    watchdog.stage(),
                    Stage::Loading { .. } | Stage::Ready(_) | Stage::Draining { .. } | Stage::Stopping { .. }
                );
                prop_assert_eq!(has_worker, running, "{:?}", watchdog.stage());
            }
        }
    }
}

//! Many requests on one engine: batches, queue, cancelling, stop strings, limits.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use std::ops::ControlFlow;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use common::ask::{answer, ask, eventually, request, tokens};
use common::{PROMPTS, SMOLLM2, model};
use freehold_engine::{
    Constraint, Engine, EngineOptions, FinishReason, GenerateEvent, GenerateRequest, Prompt, Reject,
    SamplingParams,
};

fn engine(max_sequences: u32, max_queued: u32) -> Engine {
    with_context(640, max_sequences, max_queued)
}

fn with_context(context_length: u32, max_sequences: u32, max_queued: u32) -> Engine {
    let options = EngineOptions {
        context_length: Some(context_length),
        max_sequences,
        max_queued,
        ..EngineOptions::default()
    };
    Engine::load(&model(SMOLLM2), &options, |_| ()).unwrap()
}

/// A request that would run until the context is full.
fn endless(engine: &Engine) -> GenerateRequest {
    let mut endless = request(tokens(engine, "1, 2, 3, 4,"), 600);
    // No token that ends an answer is ever chosen.
    endless.sampling.logit_bias = vec![(0, -100.0), (2, -100.0)];
    endless
}

fn idle(engine: &Engine) -> bool {
    let progress = engine.progress();
    progress.active == 0 && progress.queued == 0 && progress.kv_blocks_used == 0
}

/// Prompts from one token to more than a step reads at once; half of the requests draw with a seed.
fn varied(engine: &Engine) -> Vec<GenerateRequest> {
    (0..8_usize)
        .map(|index| {
            let text = match index {
                1 | 5 => PROMPTS[index..index + 3].join("\n"),
                2 => PROMPTS.join(" "),
                3 => "Hi".to_owned(),
                _ => PROMPTS[index].to_owned(),
            };
            let mut prompt = tokens(engine, &text);
            prompt.truncate(150);
            let mut request = request(prompt, 4 + index as u32);
            if index % 2 == 1 {
                request.sampling.temperature = 0.9;
                request.sampling.top_p = 0.95;
                request.sampling.seed = Some(index as u64);
            }
            request
        })
        .collect()
}

#[test]
fn a_row_in_a_ragged_batch_equals_the_row_alone() {
    let engine = engine(8, 0);
    let requests = varied(&engine);
    let alone: Vec<_> = requests.iter().map(|r| answer(&engine, r.clone())).collect();
    // Each joins when the one before it has begun to write, so every mixture of prompt parts and single
    // rows comes about.
    let mut asked = Vec::new();
    for (index, request) in requests.into_iter().enumerate() {
        let request = ask(&engine, request).unwrap();
        if index % 2 == 0 {
            eventually("the engine moves on", || engine.progress().active > 0);
        }
        asked.push(request);
    }
    for (index, (asked, alone)) in asked.iter().zip(&alone).enumerate() {
        let together = asked.wait();
        assert_eq!(together.text, alone.text, "request {index}");
        assert_eq!(together.tokens, alone.tokens, "request {index}");
        assert_eq!(together.finished.reason, alone.finished.reason);
    }
    eventually("everything is given back", || idle(&engine));
}

#[test]
fn a_dropped_handle_frees_the_slot_for_the_next() {
    let engine = engine(1, 1);
    let first = ask(&engine, endless(&engine)).unwrap();
    first.wait_for_text();
    let second = ask(&engine, request(tokens(&engine, PROMPTS[0]), 4)).unwrap();
    assert_eq!(engine.progress().active, 1);
    drop(first.handle);
    assert_eq!(second.wait().finished.completion_tokens, 4);
    let last = first.events.iter().last();
    assert!(
        matches!(&last, Some(GenerateEvent::Finished(f)) if f.reason == FinishReason::Cancelled),
        "{last:?}"
    );
    eventually("everything is given back", || idle(&engine));
}

#[test]
fn a_sink_that_panics_ends_its_step_and_not_the_engine() {
    let engine = engine(4, 0);
    let question = request(tokens(&engine, PROMPTS[0]), 8);
    let before = answer(&engine, question.clone());
    let beside = ask(&engine, endless(&engine)).unwrap();
    beside.wait_for_text();
    let (sender, ends) = channel();
    let sink = Box::new(move |event| {
        assert!(
            !matches!(event, GenerateEvent::Text { .. }),
            "no sink should do this"
        );
        if let GenerateEvent::Finished(end) = event {
            sender.send(end.reason).unwrap();
        }
        ControlFlow::Continue(())
    });
    let _handle = engine.generate(question.clone(), sink).unwrap();
    let end = ends.recv_timeout(std::time::Duration::from_secs(180)).unwrap();
    assert!(matches!(end, FinishReason::Error(_)), "{end:?}");
    let end = beside.wait().finished.reason;
    assert!(matches!(end, FinishReason::Error(_)), "{end:?}");
    assert_eq!(answer(&engine, question).ids(), before.ids());
    eventually("everything is given back", || idle(&engine));
}

#[test]
fn a_sink_that_breaks_cancels() {
    let engine = engine(1, 0);
    let (sender, events) = channel();
    let mut texts = 0;
    let sink = Box::new(move |event: GenerateEvent| {
        texts += usize::from(matches!(event, GenerateEvent::Text { .. }));
        let _ = sender.send(event);
        if texts == 3 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    let _handle = engine.generate(endless(&engine), sink).unwrap();
    let events: Vec<_> = events.iter().collect();
    let texts = events.iter().filter(|e| matches!(e, GenerateEvent::Text { .. }));
    assert_eq!(texts.count(), 3);
    let last = events.last();
    assert!(
        matches!(last, Some(GenerateEvent::Finished(f)) if f.reason == FinishReason::Cancelled),
        "{last:?}"
    );
    eventually("everything is given back", || idle(&engine));
}

#[test]
fn a_request_cancelled_in_the_queue_is_told_so_and_frees_its_place() {
    let engine = engine(1, 1);
    let running = ask(&engine, endless(&engine)).unwrap();
    running.wait_for_text();
    let queued = ask(&engine, request(tokens(&engine, PROMPTS[0]), 4)).unwrap();
    assert!(matches!(
        ask(&engine, request(tokens(&engine, PROMPTS[1]), 4)),
        Err(Reject::QueueFull { .. })
    ));
    drop(queued.handle);
    let events: Vec<_> = queued.events.iter().collect();
    assert!(
        matches!(events.as_slice(), [GenerateEvent::Finished(f)]
            if f.reason == FinishReason::Cancelled && f.completion_tokens == 0),
        "{events:?}"
    );
    let next = ask(&engine, request(tokens(&engine, PROMPTS[1]), 4)).unwrap();
    drop(running.handle);
    assert_eq!(next.wait().finished.completion_tokens, 4);
}

#[test]
fn a_full_queue_refuses_and_those_in_it_are_served_in_order() {
    let engine = engine(1, 3);
    let order = Arc::new(Mutex::new(Vec::new()));
    let running = ask(&engine, endless(&engine)).unwrap();
    running.wait_for_text();
    let (sender, done) = channel();
    let handles: Vec<_> = (0..3)
        .map(|index| {
            let (order, sender) = (Arc::clone(&order), sender.clone());
            let sink = Box::new(move |event| {
                match event {
                    GenerateEvent::Started { .. } => order.lock().unwrap().push(index),
                    GenerateEvent::Finished(_) => drop(sender.send(index)),
                    GenerateEvent::Text { .. } => {}
                }
                ControlFlow::Continue(())
            });
            // The later, the shorter: none overtakes for that.
            let prompt = tokens(&engine, PROMPTS[index]);
            engine.generate(request(prompt, 6 - index as u32), sink).unwrap()
        })
        .collect();
    drop(sender);
    match ask(&engine, request(tokens(&engine, PROMPTS[4]), 4)) {
        Err(reject @ Reject::QueueFull { retry_after_ms, .. }) => {
            assert!(retry_after_ms > 0);
            assert!(reject.to_string().contains("try again"), "{reject}");
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("a fifth request was taken"),
    }
    eventually("three wait", || engine.progress().queued == 3);
    drop(running.handle);
    assert_eq!(done.iter().collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(*order.lock().unwrap(), [0, 1, 2]);
    drop(handles);
    eventually("everything is given back", || idle(&engine));
    assert!(ask(&engine, request(tokens(&engine, PROMPTS[4]), 4)).is_ok());
}

#[test]
fn callers_take_turns_and_each_is_served_in_order() {
    let engine = engine(1, 6);
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut first = endless(&engine);
    first.scope = "many".to_owned();
    let running = ask(&engine, first).unwrap();
    running.wait_for_text();
    let (sender, done) = channel();
    let callers = ["many", "many", "many", "few", "many", "few"];
    let handles: Vec<_> = callers
        .iter()
        .enumerate()
        .map(|(index, caller)| {
            let (order, sender) = (Arc::clone(&order), sender.clone());
            let sink = Box::new(move |event| {
                match event {
                    GenerateEvent::Started { .. } => order.lock().unwrap().push(index),
                    GenerateEvent::Finished(_) => drop(sender.send(())),
                    GenerateEvent::Text { .. } => {}
                }
                ControlFlow::Continue(())
            });
            let mut request = request(tokens(&engine, PROMPTS[index]), 2);
            request.scope = (*caller).to_owned();
            engine.generate(request, sink).unwrap()
        })
        .collect();
    drop(sender);
    eventually("six wait", || engine.progress().queued == 6);
    drop(running.handle);
    assert_eq!(done.iter().count(), 6);
    assert_eq!(*order.lock().unwrap(), [3, 0, 5, 1, 2, 4]);
    drop(handles);
}

/// Who finds the queue full is told so before anything of the request is looked at; and a request that is refused
/// for what it asks for gives its place back.
#[test]
fn a_full_queue_costs_no_compile_and_a_refused_request_keeps_no_place() {
    let engine = engine(1, 0);
    let unfollowable = || {
        let mut request = request(tokens(&engine, PROMPTS[0]), 4);
        request.constraint = Some(Constraint::Regex("(".to_owned()));
        request
    };
    let running = ask(&engine, endless(&engine)).unwrap();
    running.wait_for_text();
    let refused = ask(&engine, unfollowable()).err();
    assert!(matches!(refused, Some(Reject::QueueFull { .. })), "{refused:?}");
    drop(running.handle);
    eventually("everything is given back", || idle(&engine));
    for _ in 0..3 {
        let refused = ask(&engine, unfollowable()).err();
        assert!(
            matches!(refused, Some(Reject::InvalidRequest { .. })),
            "{refused:?}"
        );
        let refused = ask(&engine, request(vec![u32::MAX], 4)).err();
        assert!(
            matches!(refused, Some(Reject::InvalidRequest { .. })),
            "{refused:?}"
        );
    }
    let served = ask(&engine, request(tokens(&engine, PROMPTS[0]), 4)).expect("the only place is free");
    assert_eq!(served.wait().finished.completion_tokens, 4);
}

#[test]
fn a_long_prompt_does_not_stop_the_answers_under_way() {
    let engine = engine(2, 0);
    let long = tokens(&engine, &PROMPTS.join(" ").repeat(2))[..290].to_vec();
    let (sender, events) = channel();
    let mark = |name: &'static str| {
        let sender = sender.clone();
        Box::new(move |event| {
            let _ = sender.send((name, matches!(event, GenerateEvent::Text { .. })));
            ControlFlow::Continue(())
        })
    };
    let steady = engine.generate(endless(&engine), mark("steady")).unwrap();
    while events.recv().unwrap() != ("steady", true) {}
    let late = engine.generate(request(long, 1), mark("late")).unwrap();
    let mut between = 0;
    let mut begun = false;
    loop {
        match events.recv().unwrap() {
            ("late", true) => break,
            ("late", false) => begun = true,
            (_, true) if begun => between += 1,
            _ => {}
        }
    }
    assert!(
        between >= 2,
        "only {between} tokens came while 290 prompt tokens were read"
    );
    drop((steady, late));
}

#[test]
fn stop_strings_end_the_answer_wherever_tokens_are_cut() {
    let engine = engine(1, 0);
    let whole = answer(&engine, request(tokens(&engine, PROMPTS[1]), 20));
    let characters: Vec<usize> = whole.text.char_indices().map(|(at, _)| at).collect();
    // Stop strings of several lengths that begin all over the text, inside tokens too.
    for (from, length) in [(1, 1), (7, 3), (12, 9), (20, 30)] {
        let (start, end) = (characters[from], characters[from + length]);
        let stop = &whole.text[start..end];
        let first = whole.text.find(stop).unwrap();
        let mut request = request(tokens(&engine, PROMPTS[1]), 20);
        request.stop = vec!["never in this text".into(), stop.to_owned()];
        let cut = answer(&engine, request);
        assert_eq!(cut.text, whole.text[..first], "stop {stop:?}");
        assert_eq!(cut.finished.reason, FinishReason::Stop);
        assert!(cut.finished.completion_tokens <= whole.finished.completion_tokens);
    }
}

#[test]
fn a_stop_string_longer_than_the_answer_withholds_nothing() {
    let engine = engine(1, 0);
    let whole = answer(&engine, request(tokens(&engine, PROMPTS[1]), 16));
    let mut held_to_the_end = request(tokens(&engine, PROMPTS[1]), 16);
    held_to_the_end.stop = vec![format!("{}{}", whole.text, "x".repeat(64 << 10))];
    let held = answer(&engine, held_to_the_end);
    assert_eq!(held.text, whole.text);
    assert_eq!(held.finished.reason, FinishReason::Length);
    assert_eq!(held.ids(), whole.ids());
}

#[test]
fn what_does_not_fit_the_context_is_refused_or_cut_there() {
    let engine = with_context(96, 1, 0);
    let long: Vec<u32> = tokens(&engine, "word ")
        .into_iter()
        .cycle()
        .take(engine.context_length())
        .collect();
    let refused = ask(&engine, request(long.clone(), 1)).err();
    assert_eq!(
        refused,
        Some(Reject::PromptTooLong {
            prompt_tokens: 96,
            context_length: 96
        })
    );
    let text = refused.unwrap().to_string();
    assert!(
        text.contains("96 tokens") && text.contains("shorten the prompt"),
        "{text}"
    );
    let last = answer(&engine, request(long[..95].to_vec(), 50)).finished;
    assert_eq!((last.completion_tokens, last.reason), (1, FinishReason::Length));
    let mut narrow = endless(&engine);
    narrow.max_context = Some(32);
    narrow.max_tokens = None;
    let last = answer(&engine, narrow.clone()).finished;
    assert_eq!(last.reason, FinishReason::Length);
    assert_eq!(last.prompt_tokens + last.completion_tokens, 32);
    narrow.max_context = Some(4);
    assert!(matches!(
        ask(&engine, narrow),
        Err(Reject::PromptTooLong {
            context_length: 4,
            ..
        })
    ));
    eventually("everything is given back", || idle(&engine));
}

#[test]
fn absurd_requests_are_refused_by_field() {
    let engine = engine(1, 0);
    let fine = request(tokens(&engine, PROMPTS[0]), 4);
    let with = |change: &dyn Fn(&mut GenerateRequest)| {
        let mut request = fine.clone();
        change(&mut request);
        ask(&engine, request).err().map(|reject| reject.to_string())
    };
    let refused = [
        ("temperature", with(&|r| r.sampling.temperature = f32::INFINITY)),
        ("top_p", with(&|r| r.sampling.top_p = 1e30)),
        ("max_tokens", with(&|r| r.max_tokens = Some(0))),
        ("prompt", with(&|r| r.prompt = Prompt::Tokens(Vec::new()))),
        ("prompt", with(&|r| r.prompt = Prompt::Tokens(vec![1, u32::MAX]))),
        (
            "logit_bias",
            with(&|r| r.sampling.logit_bias = vec![(u32::MAX, 1.0)]),
        ),
    ];
    for (field, error) in refused {
        let error = error.unwrap_or_else(|| panic!("{field} was taken"));
        assert!(error.starts_with(field), "{error}");
    }
    assert!(matches!(
        engine.embed(&[Prompt::Text("text".into())]),
        Err(Reject::Unsupported { .. })
    ));
    assert_eq!(with(&|r| r.max_tokens = Some(u32::MAX)), None);
}

#[test]
fn text_is_whole_characters_however_bytes_fall_on_tokens() {
    let engine = engine(2, 0);
    // Tokens that are no text by themselves, and of those the ones that begin inside a character.
    let tokens_with = |wanted: &dyn Fn(&[u8]) -> bool| -> Vec<(u32, f32)> {
        let all = 0..engine.tokenizer().vocab_size() as u32;
        let wanted = all.filter(|&token| {
            let mut bytes = Vec::new();
            engine.tokenizer().append_bytes(token, &mut bytes);
            wanted(&bytes)
        });
        wanted.map(|token| (token, 100.0)).collect()
    };
    let fragments = tokens_with(&|bytes| std::str::from_utf8(bytes).is_err());
    let tails = tokens_with(&|bytes| bytes.first().is_some_and(|byte| byte & 0xc0 == 0x80));
    assert!(tails.len() >= 50 && fragments.len() > tails.len());
    let asked = [fragments, tails].map(|only| {
        let mut request = request(tokens(&engine, "日本語 🎉"), 30);
        request.sampling = SamplingParams {
            temperature: 2.0,
            seed: Some(1),
            logprobs: Some(0),
            logit_bias: only,
            ..SamplingParams::default()
        };
        ask(&engine, request).unwrap()
    });
    let sound = asked.map(|asked| {
        let answer = asked.wait();
        let bytes = answer.tokens.iter().flat_map(|token| token.bytes.clone());
        let bytes: Vec<u8> = bytes.collect();
        assert_eq!(answer.text, String::from_utf8_lossy(&bytes));
        (
            answer.text.chars().count() < answer.tokens.len(),
            std::str::from_utf8(&bytes).is_ok(),
        )
    });
    assert!(sound[0].0, "no character was cut: the test proves nothing");
    assert!(!sound[1].1, "no byte stood alone: the test proves nothing");
}

#[test]
fn chats_are_rendered_and_control_tokens_of_users_are_text() {
    let engine = engine(1, 0);
    let messages = serde_json::json!([{"role": "user", "content": "Say hi."}]);
    let mut chat = request(Vec::new(), 8);
    chat.prompt = Prompt::Chat {
        messages: messages.clone(),
        tools: None,
    };
    let asked = ask(&engine, chat).unwrap();
    let rendered = engine.render_chat(&messages, None).unwrap();
    assert!(
        rendered.contains("<|im_start|>user\nSay hi.<|im_end|>"),
        "{rendered}"
    );
    // Each control token is one token, so the prompt is shorter than the same text typed by a user.
    assert!(asked.handle.prompt_tokens < tokens(&engine, &rendered).len());
    assert_eq!(asked.wait().finished.prompt_tokens, asked.handle.prompt_tokens);
}

#[test]
fn progress_counts_what_was_done() {
    let engine = engine(2, 0);
    let before = engine.progress();
    let prompt = tokens(&engine, &PROMPTS[..14].join(" "));
    let (count, completion) = (prompt.len() as u64, 8);
    answer(&engine, request(prompt, completion));
    let after = engine.progress();
    assert_eq!(
        after.tokens_generated - before.tokens_generated,
        u64::from(completion)
    );
    assert_eq!(after.prompt_tokens - before.prompt_tokens, count);
    assert!(after.steps - before.steps >= u64::from(completion));
    assert!(after.tokens_per_second > 0.0);
    eventually("everything is given back", || idle(&engine));
}

#[test]
fn an_engine_that_goes_tells_everyone() {
    let engine = engine(1, 2);
    let running = ask(&engine, endless(&engine)).unwrap();
    running.wait_for_text();
    let queued = ask(&engine, request(tokens(&engine, PROMPTS[0]), 4)).unwrap();
    eventually("one waits", || engine.progress().queued == 1);
    drop(engine);
    assert_eq!(running.wait().finished.reason, FinishReason::Cancelled);
    assert_eq!(queued.wait().finished.reason, FinishReason::Cancelled);
}

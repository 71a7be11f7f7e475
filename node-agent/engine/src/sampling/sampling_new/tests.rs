//! Choosing among a few logits by hand.

use super::*;

fn frequencies(params: SamplingParams, logits: &[f32]) -> Vec<f32> {
    let mut sampler = Sampler::new(
        SamplingParams {
            seed: Some(7),
            ..params
        },
        &[],
    );
    let mut counts = vec![0.0; logits.len()];
    for _ in 0..4000 {
        counts[sampler.sample(&mut logits.to_vec()).token as usize] += 1.0 / 4000.0;
    }
    counts
}

#[test]
fn temperature_zero_takes_the_first_of_the_best() {
    let mut sampler = Sampler::new(SamplingParams::default(), &[]);
    assert_eq!(sampler.sample(&mut [1.0, 3.0, 3.0]).token, 1);
}

#[test]
fn a_seed_repeats_the_choice() {
    let params = SamplingParams {
        temperature: 1.0,
        seed: Some(5),
        ..SamplingParams::default()
    };
    let draw = || {
        let mut sampler = Sampler::new(params.clone(), &[]);
        (0..20)
            .map(|_| sampler.sample(&mut vec![0.0; 100]).token)
            .collect::<Vec<_>>()
    };
    assert_eq!(draw(), draw());
}

#[test]
fn probabilities_are_those_of_the_softmax() {
    let logits = [0.0, 1.0_f32, 2.0];
    let total: f32 = logits.iter().map(|l| l.exp()).sum();
    let found = frequencies(
        SamplingParams {
            temperature: 1.0,
            ..SamplingParams::default()
        },
        &logits,
    );
    for (found, logit) in found.iter().zip(logits) {
        assert!((found - logit.exp() / total).abs() < 0.03, "{found}");
    }
}

#[test]
fn limits_cut_the_unlikely() {
    let logits = [0.0, 1.0, 2.0, 3.0];
    let hot = SamplingParams {
        temperature: 1.0,
        ..SamplingParams::default()
    };
    let top_k = frequencies(
        SamplingParams {
            top_k: 2,
            ..hot.clone()
        },
        &logits,
    );
    assert!(top_k[0] == 0.0 && top_k[1] == 0.0 && top_k[2] > 0.0);
    let top_p = frequencies(
        SamplingParams {
            top_p: 0.6,
            ..hot.clone()
        },
        &logits,
    );
    assert!(top_p[3] > 0.99);
    let min_p = frequencies(SamplingParams { min_p: 0.3, ..hot }, &logits);
    assert!(min_p[1] == 0.0 && min_p[2] > 0.0);
}

#[test]
fn penalties_and_bias_move_the_best() {
    let penalised = SamplingParams {
        frequency_penalty: 2.0,
        ..SamplingParams::default()
    };
    let mut sampler = Sampler::new(penalised, &[]);
    let tokens: Vec<u32> = (0..2).map(|_| sampler.sample(&mut [1.0, 2.0]).token).collect();
    assert_eq!(tokens, [1, 0]);
    let biased = SamplingParams {
        logit_bias: vec![(0, 50.0)],
        ..SamplingParams::default()
    };
    assert_eq!(Sampler::new(biased, &[]).sample(&mut [1.0, 2.0]).token, 0);
    let repetition = SamplingParams {
        repetition_penalty: 3.0,
        ..SamplingParams::default()
    };
    assert_eq!(Sampler::new(repetition, &[1]).sample(&mut [1.0, 2.0]).token, 0);
}

#[test]
fn logprobs_are_logarithms_of_probabilities() {
    let mut sampler = Sampler::new(
        SamplingParams {
            logprobs: Some(2),
            ..SamplingParams::default()
        },
        &[],
    );
    let sampled = sampler.sample(&mut [0.0, 1.0, 2.0]);
    assert_eq!(sampled.top.len(), 2);
    assert_eq!(sampled.logprob, Some(sampled.top[0].1));
    assert!((sampled.top[0].1 - -0.407_606).abs() < 1e-4, "{sampled:?}");
}

#[test]
fn what_a_grammar_took_out_is_never_chosen_and_no_alternative() {
    let params = SamplingParams {
        temperature: 2.0,
        repetition_penalty: 1.5,
        frequency_penalty: -2.0,
        logit_bias: vec![(0, 100.0), (3, 100.0)],
        logprobs: Some(4),
        seed: Some(1),
        ..SamplingParams::default()
    };
    let mut sampler = Sampler::new(params, &[0, 1, 2, 3]);
    for _ in 0..200 {
        let mut logits = [f32::NEG_INFINITY, 1.0, 2.0, f32::NEG_INFINITY];
        let sampled = sampler.sample(&mut logits);
        assert!([1, 2].contains(&sampled.token), "{sampled:?}");
        assert_eq!(sampled.top.len(), 2, "{sampled:?}");
        assert!(sampled.logprob.unwrap().is_finite());
    }
}

#[test]
fn absurd_numbers_are_refused_by_name() {
    for (params, field) in [
        (
            SamplingParams {
                temperature: f32::NAN,
                ..SamplingParams::default()
            },
            "temperature",
        ),
        (
            SamplingParams {
                top_p: -1.0,
                ..SamplingParams::default()
            },
            "top_p",
        ),
        (
            SamplingParams {
                logit_bias: vec![(9, 1.0)],
                ..SamplingParams::default()
            },
            "logit_bias",
        ),
        (
            SamplingParams {
                logprobs: Some(99),
                ..SamplingParams::default()
            },
            "logprobs",
        ),
    ] {
        assert!(params.validate(3).unwrap_err().to_string().starts_with(field));
    }
}

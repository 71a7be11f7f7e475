//! Choosing among a few logits by hand, and among many by chance.

use rand::Rng;

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

/// A set of tokens that counts how it is asked.
struct Set {
    tokens: Vec<u32>,
    asked: usize,
    masked: usize,
}

impl Allowed for Set {
    fn allows(&mut self, token: u32) -> Result<bool, String> {
        self.asked += 1;
        Ok(self.tokens.contains(&token))
    }

    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        self.masked += 1;
        for (token, logit) in logits.iter_mut().enumerate() {
            if !self.tokens.contains(&(token as u32)) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }
}

fn set(tokens: &[u32]) -> Set {
    Set {
        tokens: tokens.to_vec(),
        asked: 0,
        masked: 0,
    }
}

/// A vocabulary's logits.
fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(-12.0..12.0)).collect()
}

#[test]
fn the_likeliest_of_the_allowed_is_found_as_if_the_others_were_taken_out_first() {
    for seed in 0..200 {
        let logits = random(seed, 3000);
        let mut rng = StdRng::seed_from_u64(seed);
        // From almost all to almost none.
        let share = rng.random_range(0.001..1.0_f64).powi(3);
        let tokens: Vec<u32> = (0..3000).filter(|_| rng.random_bool(share)).collect();
        if tokens.is_empty() {
            continue;
        }
        let mut masked = logits.clone();
        set(&tokens).mask(&mut masked).unwrap();
        let wanted = Sampler::new(SamplingParams::default(), &[])
            .sample(&mut masked)
            .token;
        let mut allowed = set(&tokens);
        let mut sampler = Sampler::new(SamplingParams::default(), &[]);
        let found = sampler.sample_allowed(&mut logits.clone(), &mut allowed).unwrap();
        assert_eq!(found.token, wanted, "seed {seed}");
        assert!(allowed.asked <= TRIES && allowed.masked <= 1);
    }
}

#[test]
fn what_is_allowed_is_drawn_by_its_share_of_what_is_allowed() {
    let logits = [0.0, 1.0_f32, 2.0, 3.0, 1.5];
    let tokens = [0, 2, 4];
    let total: f32 = tokens.iter().map(|&token| logits[token as usize].exp()).sum();
    let params = SamplingParams {
        temperature: 1.0,
        seed: Some(11),
        ..SamplingParams::default()
    };
    for top_k in [0, 2] {
        let params = SamplingParams {
            top_k,
            ..params.clone()
        };
        let mut sampler = Sampler::new(params, &[]);
        let mut counts = [0.0; 5];
        let mut allowed = set(&tokens);
        for _ in 0..8000 {
            let sampled = sampler
                .sample_allowed(&mut logits.to_vec(), &mut allowed)
                .unwrap();
            counts[sampled.token as usize] += 1.0 / 8000.0;
        }
        assert!(counts[1] == 0.0 && counts[3] == 0.0, "{counts:?}");
        if top_k == 0 {
            assert_eq!(allowed.masked, 0);
            for token in tokens {
                let wanted = logits[token as usize].exp() / total;
                assert!((counts[token as usize] - wanted).abs() < 0.02, "{counts:?}");
            }
        } else {
            // The two likeliest of those that are allowed, and not of all.
            assert!(
                counts[0] == 0.0 && counts[2] > 0.55 && counts[4] > 0.3,
                "{counts:?}"
            );
            // Token 2 is surely one of the two likeliest, 4 once 3 was refused, and 0 is not once the others are known.
            assert!(allowed.masked < 2000, "{}", allowed.masked);
        }
    }
}

#[test]
fn cuts_fall_on_what_is_allowed_though_few_are_asked_about() {
    // top_k, top_p, min_p, temperature; of how many draws at most all tokens are asked about.
    let cuts = [
        (0, 0.95, 0.0, 0.7, 0.3),
        (0, 0.5, 0.0, 0.7, 0.9),
        (40, 0.95, 0.05, 0.7, 0.3),
        (5, 0.0, 0.0, 0.7, 0.8),
        (0, 0.0, 0.1, 0.7, 0.3),
        (12, 0.8, 0.02, 0.7, 0.7),
        (0, 0.9, 0.0, 2.0, 0.9),
        (9000, 1.0, 0.0, 0.2, 0.3),
    ];
    const DRAWS: usize = 4000;
    for (case, (top_k, top_p, min_p, temperature, most_masked)) in cuts.into_iter().enumerate() {
        let mut masked_draws = 0;
        for seed in 0..8 {
            // Of one chunk and of several.
            let vocabulary = if seed < 6 { 200 } else { 2500 };
            let mut rng = StdRng::seed_from_u64(seed * 100 + case as u64);
            // Some alike, and of some vocabularies nearly nothing is allowed.
            let logits: Vec<f32> = (0..200)
                .map(|_| rng.random_range(-24..24_i32) as f32 / 4.0)
                .collect();
            let share = rng.random_range(0.05..1.0);
            let tokens: Vec<u32> = (0..vocabulary).filter(|_| rng.random_bool(share)).collect();
            let params = SamplingParams {
                temperature,
                top_k,
                top_p,
                min_p,
                seed: Some(seed),
                ..SamplingParams::default()
            };
            let mut masked = logits.clone();
            set(&tokens).mask(&mut masked).unwrap();
            let mut wanted = left(&params, &masked);
            wanted.retain(|_, share| *share > 0.0);
            let mut sampler = Sampler::new(params.clone(), &[]);
            let mut allowed = set(&tokens);
            let mut counts: HashMap<u32, usize> = HashMap::new();
            for _ in 0..DRAWS {
                let asked = allowed.asked;
                let sampled = sampler.sample_allowed(&mut logits.clone(), &mut allowed).unwrap();
                assert!(allowed.asked - asked <= TRIES + CUT_TRIES);
                *counts.entry(sampled.token).or_default() += 1;
            }
            masked_draws += allowed.masked;
            assert!(
                counts.keys().all(|token| wanted.contains_key(token)),
                "{params:?}: some were cut"
            );
            // Chi-square, with what is expected less than five times as one: as much as there are terms on average, and five
            // times its spread beyond that.
            let (mut rare, mut unlike, mut terms) = ((0.0, 0.0), 0.0, 0.0);
            let mut add = |expected: f64, found: f64| {
                unlike += (found - expected).powi(2) / expected;
                terms += 1.0;
            };
            for (token, share) in wanted {
                let (expected, found) = (share * DRAWS as f64, counts.get(&token).copied().unwrap_or(0));
                if expected < 5.0 {
                    rare = (rare.0 + expected, rare.1 + found as f64);
                } else {
                    add(expected, found as f64);
                }
            }
            if rare.0 > 0.0 {
                add(rare.0.max(1.0), rare.1);
            }
            assert!(
                unlike < terms + 5.0 * (2.0_f64 * terms).sqrt() + 5.0,
                "{params:?}: {unlike} of {terms}"
            );
        }
        let masked = masked_draws as f64 / (8 * DRAWS) as f64;
        assert!(masked < most_masked, "case {case}: {masked}");
    }
}

#[test]
fn what_is_allowed_is_found_among_logits_that_are_no_numbers() {
    let params = SamplingParams {
        temperature: 1.0,
        top_p: 0.9,
        top_k: 3,
        min_p: 0.01,
        seed: Some(4),
        ..SamplingParams::default()
    };
    let choose = |logits: &[f32], tokens: &[u32]| {
        let mut sampler = Sampler::new(params.clone(), &[]);
        let sampled = sampler.sample_allowed(&mut logits.to_vec(), &mut set(tokens));
        sampled.unwrap().token
    };
    let (nan, infinity) = (f32::NAN, f32::INFINITY);
    assert_eq!(choose(&[0.0, infinity, 1.0], &[0, 1]), 1);
    assert_eq!(choose(&[0.0, infinity, 1.0], &[0]), 0);
    assert_eq!(choose(&[0.0, 30.0, nan, -infinity], &[0, 1]), 1);
    assert_eq!(choose(&[0.0, 30.0, nan, -infinity], &[0]), 0);
    assert_eq!(choose(&[-infinity; 40], &[7]), 0);
    assert_eq!(choose(&[], &[]), 0);
}

#[test]
fn where_nearly_nothing_is_allowed_all_are_asked_about_at_once() {
    for temperature in [0.0, 1.0] {
        let params = SamplingParams {
            temperature,
            seed: Some(1),
            ..SamplingParams::default()
        };
        let logits = random(5, 3000);
        let worst = logits
            .iter()
            .enumerate()
            .min_by(|a, b| a.1.total_cmp(b.1))
            .unwrap()
            .0;
        let mut allowed = set(&[worst as u32]);
        let found = Sampler::new(params, &[]).sample_allowed(&mut logits.clone(), &mut allowed);
        assert_eq!(found.unwrap().token, worst as u32);
        assert_eq!((allowed.asked, allowed.masked), (TRIES, 1));
    }
}

/// Tokens that are left, and their weights, by the definition of the cuts.
fn left(params: &SamplingParams, logits: &[f32]) -> HashMap<u32, f64> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: f32| (f64::from(logit - most) / f64::from(params.temperature)).exp();
    let mut all: Vec<(f64, u32)> = logits
        .iter()
        .enumerate()
        .map(|(t, &l)| (weight(l), t as u32))
        .collect();
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    if params.top_k > 0 {
        all.truncate(params.top_k as usize);
    }
    all.retain(|(weight, _)| params.min_p == 0.0 || *weight >= f64::from(params.min_p));
    let total: f64 = all.iter().map(|(weight, _)| weight).sum();
    let mut sum = 0.0;
    let mut kept = HashMap::new();
    for (weight, token) in all {
        kept.insert(token, weight);
        sum += weight;
        if params.top_p > 0.0 && params.top_p < 1.0 && sum / total >= f64::from(params.top_p) {
            break;
        }
    }
    kept.values_mut().for_each(|weight| *weight /= sum);
    kept
}

#[test]
fn tokens_of_a_large_vocabulary_are_drawn_by_their_weights_within_the_cuts() {
    // More than a chunk of sums, and no multiple of anything.
    let mut logits = random(3, 5003);
    logits[4999] = 14.0;
    let base = SamplingParams {
        temperature: 0.9,
        seed: Some(2),
        ..SamplingParams::default()
    };
    let cuts = [
        SamplingParams {
            temperature: 0.2,
            ..base.clone()
        },
        SamplingParams {
            top_k: 40,
            ..base.clone()
        },
        SamplingParams {
            top_k: 5000,
            ..base.clone()
        },
        SamplingParams {
            top_p: 0.3,
            ..base.clone()
        },
        SamplingParams {
            top_p: 0.999_999,
            temperature: 1.9,
            ..base.clone()
        },
        SamplingParams {
            min_p: 0.1,
            ..base.clone()
        },
        SamplingParams {
            min_p: 1e-4,
            ..base.clone()
        },
        SamplingParams {
            top_k: 300,
            top_p: 0.5,
            min_p: 0.01,
            ..base.clone()
        },
        base,
    ];
    for params in cuts {
        let wanted = left(&params, &logits);
        let mut sampler = Sampler::new(params.clone(), &[]);
        let mut counts: HashMap<u32, f64> = HashMap::new();
        let draws = 3000;
        for _ in 0..draws {
            *counts
                .entry(sampler.sample(&mut logits.clone()).token)
                .or_default() += 1.0 / f64::from(draws);
        }
        for (token, found) in &counts {
            let wanted = wanted.get(token);
            // A cut at a sum may fall one token further by rounding.
            assert!(
                wanted.is_some() || params.top_p > 0.999,
                "{params:?}: {token} was cut"
            );
            let wanted = wanted.copied().unwrap_or_default();
            let spread = (wanted / f64::from(draws)).sqrt();
            assert!(
                (found - wanted).abs() < 5.0 * spread + 0.004,
                "{params:?}: {token}: {found}, not {wanted}"
            );
        }
        let likely = wanted.iter().filter(|(_, share)| **share > 0.01);
        for (token, _) in likely {
            assert!(counts.contains_key(token), "{params:?}: {token} was never drawn");
        }
    }
}

#[test]
fn logits_that_are_no_numbers_end_in_a_token_that_is_one() {
    let params = |top_p: f32, temperature: f32| SamplingParams {
        temperature,
        top_p,
        seed: Some(4),
        ..SamplingParams::default()
    };
    for params in [params(0.0, 0.0), params(0.0, 1.0), params(0.9, 1.0)] {
        let choose = |logits: &[f32]| {
            Sampler::new(params.clone(), &[])
                .sample(&mut logits.to_vec())
                .token
        };
        let (nan, infinity) = (f32::NAN, f32::INFINITY);
        assert_eq!(choose(&[0.0, infinity, 1.0]), 1, "{params:?}");
        assert_eq!(choose(&[0.0, 30.0, nan, -infinity]), 1, "{params:?}");
        assert_eq!(choose(&[-infinity, -infinity, 2.0]), 2, "{params:?}");
        for nothing in [&[][..], &[nan, nan], &[-infinity; 40]] {
            assert_eq!(choose(nothing), 0, "{params:?}");
        }
    }
    // More are asked for than there are.
    let many = SamplingParams {
        top_k: 50,
        ..params(0.5, 1.0)
    };
    assert!(Sampler::new(many, &[]).sample(&mut [0.0, 9.0]).token < 2);
}

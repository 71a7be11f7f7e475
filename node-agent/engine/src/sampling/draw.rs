//! Drawing a token by its probability, without sorting a vocabulary of which a few tokens matter.

use rand::Rng;
use rand::rngs::StdRng;

use super::SamplingParams;
use crate::kernels::vector::{WEIGHTS, weight_sums, weights};

/// How far below the best a token's logit may lie, in temperatures: e^-8 of it leaves a few dozen as a rule, and e^-25
/// leaves out less than a millionth over any vocabulary.
const DEPTHS: [f32; 2] = [8.0, 25.0];
/// Logits that are looked over at once for whether any of them matters.
const LOOK: usize = 64;

/// Draws one of `[vocabulary]` logits, of which that at `best` is the largest. None when they are no numbers.
pub(super) fn draw(params: &SamplingParams, rng: &mut StdRng, logits: &[f32], best: usize) -> Option<u32> {
    let most = *logits.get(best)?;
    if !most.is_finite() {
        return None;
    }
    let scale = 1.0 / params.temperature;
    let drawn = if params.cuts() {
        draw_of_few(params, rng, logits, most)
    } else {
        draw_of_all(rng, logits, most, scale)
    };
    Some(drawn.unwrap_or(best) as u32)
}

/// Draws from all of them: first the chunk, then the token in it.
fn draw_of_all(rng: &mut StdRng, logits: &[f32], most: f32, scale: f32) -> Option<usize> {
    let sums = weight_sums(logits, most, scale);
    let total: f64 = sums.iter().map(|&sum| f64::from(sum)).sum();
    let mut point = rng.random::<f64>() * total;
    let mut buffer = [0.0; WEIGHTS];
    let mut last = None;
    for (index, (chunk, sum)) in logits.chunks(WEIGHTS).zip(sums).enumerate() {
        if point >= f64::from(sum) {
            point -= f64::from(sum);
            continue;
        }
        let buffer = &mut buffer[..chunk.len()];
        weights(chunk, most, scale, buffer);
        for (offset, (&weight, logit)) in buffer.iter().zip(chunk).enumerate() {
            // What was taken out has a weight of next to nothing, not of nothing.
            if *logit == f32::NEG_INFINITY {
                continue;
            }
            last = Some(index * WEIGHTS + offset);
            point -= f64::from(weight);
            if point < 0.0 {
                return last;
            }
        }
        // Sums of the same numbers in another order: the next chunk's first, or the last there was.
    }
    last
}

/// Draws from those that `top_k`, `min_p` and `top_p` leave.
fn draw_of_few(params: &SamplingParams, rng: &mut StdRng, logits: &[f32], most: f32) -> Option<usize> {
    let [shallow, deep] = DEPTHS;
    let mut candidates = candidates(params, logits, most, shallow);
    if !suffice(params, &candidates, logits, most) {
        candidates = self::candidates(params, logits, most, deep);
    }
    candidates.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    if params.top_k > 0 {
        candidates.truncate(params.top_k as usize);
    }
    if params.min_p > 0.0 {
        // The best has weight 1, so a weight is relative to it already.
        candidates.retain(|(weight, _)| *weight >= params.min_p);
    }
    if params.cuts_by_sum() {
        let total = if params.top_k > 0 || params.min_p > 0.0 {
            candidates.iter().map(|(weight, _)| f64::from(*weight)).sum()
        } else {
            total_weight(params, logits, most)
        };
        let mut sum = 0.0;
        let wanted = candidates.iter().position(|(weight, _)| {
            sum += f64::from(*weight) / total;
            sum >= f64::from(params.top_p)
        });
        candidates.truncate(wanted.map_or(candidates.len(), |at| at + 1));
    }
    let total: f32 = candidates.iter().map(|(weight, _)| weight).sum();
    let mut point = rng.random::<f32>() * total;
    for (weight, token) in &candidates {
        point -= weight;
        if point < 0.0 {
            return Some(*token);
        }
    }
    candidates.last().map(|(_, token)| *token)
}

/// Tokens whose logits lie at most `depth` temperatures below the best, with their weights beside it.
fn candidates(params: &SamplingParams, logits: &[f32], most: f32, depth: f32) -> Vec<(f32, usize)> {
    let floor = most - depth * params.temperature;
    let mut found = Vec::new();
    for (index, chunk) in logits.chunks(LOOK).enumerate() {
        if !chunk.iter().fold(false, |any, &logit| any | (logit >= floor)) {
            continue;
        }
        let here = chunk.iter().enumerate().filter(|(_, logit)| **logit >= floor);
        found.extend(
            here.map(|(offset, &logit)| (((logit - most) / params.temperature).exp(), index * LOOK + offset)),
        );
    }
    found
}

/// Whether no token outside of these could be left by the cuts.
fn suffice(params: &SamplingParams, candidates: &[(f32, usize)], logits: &[f32], most: f32) -> bool {
    if params.top_k > 0 {
        return candidates.len() >= params.top_k as usize;
    }
    if params.min_p > 0.0 {
        return params.min_p >= (-DEPTHS[0]).exp();
    }
    let sum: f64 = candidates.iter().map(|(weight, _)| f64::from(*weight)).sum();
    sum >= f64::from(params.top_p) * total_weight(params, logits, most)
}

fn total_weight(params: &SamplingParams, logits: &[f32], most: f32) -> f64 {
    let sums = weight_sums(logits, most, 1.0 / params.temperature);
    sums.iter().map(|&sum| f64::from(sum)).sum()
}

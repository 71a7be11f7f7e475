//! Drawing a token by its probability, without sorting a vocabulary of which a few tokens matter.

use rand::Rng;
use rand::rngs::StdRng;

use super::SamplingParams;
use crate::kernels::vector::{CHUNK, weight_sums, weights};

/// How far below the best a token's logit may lie, in temperatures: e^-8 of it leaves a few dozen as a rule, and e^-25
/// leaves out less than a millionth over any vocabulary.
const DEPTHS: [f32; 2] = [8.0, 25.0];
/// Logits that are looked over at once for whether any of them matters.
const LOOK: usize = 64;

/// Draws one of `[vocabulary]` logits, of which that at `best` is the largest. None when that is minus infinity.
pub(super) fn draw(params: &SamplingParams, rng: &mut StdRng, logits: &[f32], best: usize) -> Option<u32> {
    let most = *logits.get(best)?;
    if most == f32::NEG_INFINITY {
        return None;
    }
    if most == f32::INFINITY {
        return Some(best as u32);
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
    if !total.is_finite() {
        // Something among them is no number: the best is.
        return None;
    }
    let mut point = rng.random::<f64>() * total;
    let mut buffer = [0.0; CHUNK];
    let mut last = None;
    for (index, (chunk, sum)) in logits.chunks(CHUNK).zip(sums).enumerate() {
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
            last = Some(index * CHUNK + offset);
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
    // `top_p` alone is a share of all of them.
    let all = (params.top_k == 0 && params.min_p <= 0.0).then(|| {
        let sums = weight_sums(logits, most, 1.0 / params.temperature);
        sums.iter().map(|&sum| f64::from(sum)).sum::<f64>()
    });
    let [shallow, deep] = DEPTHS;
    let mut candidates = within(params, logits, most, shallow);
    let suffice = match all {
        _ if params.top_k > 0 => candidates.len() >= params.top_k as usize,
        Some(all) => total(&candidates) >= f64::from(params.top_p) * all,
        None => params.min_p >= (-shallow).exp(),
    };
    if !suffice {
        candidates = within(params, logits, most, deep);
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
        let all = all.filter(|all| all.is_finite()).unwrap_or(total(&candidates));
        let mut sum = 0.0;
        let wanted = candidates.iter().position(|(weight, _)| {
            sum += f64::from(*weight) / all;
            sum >= f64::from(params.top_p)
        });
        candidates.truncate(wanted.map_or(candidates.len(), |at| at + 1));
    }
    let mut point = rng.random::<f64>() * total(&candidates);
    for (weight, token) in &candidates {
        point -= f64::from(*weight);
        if point < 0.0 {
            return Some(*token);
        }
    }
    candidates.last().map(|(_, token)| *token)
}

/// Tokens whose logits lie at most `depth` temperatures below the best, with their weights beside it.
fn within(params: &SamplingParams, logits: &[f32], most: f32, depth: f32) -> Vec<(f32, usize)> {
    let floor = most - depth * params.temperature;
    let mut found = Vec::new();
    for (index, chunk) in logits.chunks(LOOK).enumerate() {
        // Without a branch for each: few chunks hold any.
        if !chunk.iter().fold(false, |any, &logit| any | (logit >= floor)) {
            continue;
        }
        for (offset, &logit) in chunk.iter().enumerate() {
            if logit >= floor {
                let weight = ((logit - most) / params.temperature).exp();
                found.push((weight, index * LOOK + offset));
            }
        }
    }
    found
}

fn total(candidates: &[(f32, usize)]) -> f64 {
    candidates.iter().map(|(weight, _)| f64::from(*weight)).sum()
}

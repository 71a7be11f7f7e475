//! Drawing a token by its probability, without sorting a vocabulary of which a few tokens matter.

use std::cmp::Ordering;

use rand::Rng;
use rand::rngs::StdRng;

use super::SamplingParams;
use crate::kernels::vector::{CHUNK, argmax, weight_sums, weights};

/// How far below the best a token's logit may lie, in temperatures: e^-8 of it leaves a few dozen as a rule, and e^-25
/// leaves out less than a millionth over any vocabulary.
const DEPTHS: [f32; 2] = [8.0, 25.0];
/// Logits that are looked over at once for whether any of them matters.
const LOOK: usize = 64;

/// Draws one of `[vocabulary]` logits. None when none is above minus infinity.
pub(super) fn of_all(params: &SamplingParams, rng: &mut StdRng, logits: &[f32]) -> Option<u32> {
    of(logits, |most| {
        draw_of_all(rng, logits, most, 1.0 / params.temperature)
    })
}

/// Draws one of those that the cuts leave. `drawn`, which was drawn from all, is it if the cuts leave it: had all been drawn
/// from again until the cuts left one, it would have been the first. None when no logit is above minus infinity.
pub(super) fn of_kept(
    params: &SamplingParams,
    rng: &mut StdRng,
    logits: &[f32],
    drawn: Option<u32>,
) -> Option<u32> {
    of(logits, |most| {
        let candidates = kept(params, logits, most);
        let drawn = drawn.map(|token| token as usize);
        match drawn.filter(|drawn| candidates.iter().any(|(_, token)| token == drawn)) {
            Some(drawn) => Some(drawn),
            None => draw_of_few(rng, &candidates),
        }
    })
}

/// What `draw` draws, given the largest logit; that one where it finds none, or where nothing else can be.
fn of(logits: &[f32], draw: impl FnOnce(f32) -> Option<usize>) -> Option<u32> {
    let best = argmax(logits)?;
    let most = *logits.get(best)?;
    if most == f32::NEG_INFINITY {
        return None;
    }
    if most == f32::INFINITY {
        return Some(best as u32);
    }
    Some(draw(most).unwrap_or(best) as u32)
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

fn draw_of_few(rng: &mut StdRng, candidates: &[(f32, usize)]) -> Option<usize> {
    let mut point = rng.random::<f64>() * total(candidates);
    for (weight, token) in candidates {
        point -= f64::from(*weight);
        if point < 0.0 {
            return Some(*token);
        }
    }
    candidates.last().map(|(_, token)| *token)
}

/// The other tokens that must be allowed too before it is certain that the cuts leave `token`; none: it is. `token` and `known`
/// are allowed; of the others nobody knows, but for those at minus infinity, which are not. None where more than `most_open`
/// would have to be asked about.
///
/// A token outlasts `top_p` when the likelier ones have less than that share of all that the other cuts leave. A likelier one
/// that is not allowed only helps, so what is wanted is enough that is allowed among the less likely.
pub(super) fn undecided(
    params: &SamplingParams,
    logits: &[f32],
    token: u32,
    known: &[u32],
    most_open: usize,
) -> Option<Vec<u32>> {
    let most = logits.get(argmax(logits)?)?;
    let candidates = within(params, logits, *most, DEPTHS[0]);
    let own = *candidates.iter().find(|(_, found)| *found == token as usize)?;
    let is_likelier = |other: &(f32, usize)| by_weight(other, &own).is_lt();
    let (likelier, mut others): (Vec<_>, Vec<_>) = candidates.into_iter().partition(is_likelier);
    let ranks = if params.top_k > 0 {
        params.top_k as usize
    } else {
        usize::MAX
    };
    if likelier.len() >= ranks || own.0 < params.min_p {
        return None;
    }
    if !params.cuts_by_sum() {
        return Some(Vec::new());
    }
    others.retain(|&(weight, other)| other != own.1 && weight >= params.min_p);
    let counted = (ranks - likelier.len() - 1).min(known.len() + most_open);
    if counted < others.len() {
        others.select_nth_unstable_by(counted, by_weight);
        others.truncate(counted);
    }
    others.sort_unstable_by(by_weight);
    let share = f64::from(params.top_p);
    let mut wanted = total(&likelier) * (1.0 - share) / share - f64::from(own.0);
    let mut open = Vec::new();
    for (weight, other) in others {
        if wanted < 0.0 {
            break;
        }
        wanted -= f64::from(weight);
        if !known.contains(&(other as u32)) {
            open.push(other as u32);
        }
    }
    (wanted < 0.0 && open.len() <= most_open).then_some(open)
}

/// Those that `top_k`, `min_p` and `top_p` leave, the likeliest first, with their weights.
fn kept(params: &SamplingParams, logits: &[f32], most: f32) -> Vec<(f32, usize)> {
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
    candidates.sort_unstable_by(by_weight);
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
    candidates
}

/// The likeliest first; of two alike, the first in the vocabulary.
fn by_weight(a: &(f32, usize), b: &(f32, usize)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
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

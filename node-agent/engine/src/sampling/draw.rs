//! Drawing a token by its probability, without sorting a vocabulary of which a few tokens matter.

use std::cmp::Ordering;

use rand::Rng;
use rand::rngs::StdRng;

use super::SamplingParams;
use crate::kernels::vector::{CHUNK, argmax, weight_sums, weights};

/// How far below the best a token's logit may lie, in temperatures: e^-8 of it leaves a few dozen as a rule, and e^-25
/// leaves out less than four millionths of a vocabulary of 262144.
const DEPTHS: [f32; 2] = [8.0, 25.0];
/// Logits that are looked over at once for whether any of them matters.
const LOOK: usize = 64;
/// Tokens that are drawn from all before those that `top_p` leaves are looked for. At 0.9 all are in vain at most once in ten
/// thousand times, at 0.5 once in sixteen.
const DRAWS: usize = 4;

/// Draws one of `[vocabulary]` logits. None when none is above minus infinity.
pub(super) fn of_all(params: &SamplingParams, rng: &mut StdRng, logits: &[f32]) -> Option<u32> {
    of(logits, |most| All::new(params, logits, most)?.draw(rng))
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
        let mut drawn = drawn.map(|token| token as usize);
        // `top_p` alone leaves most of what is drawn, and to see that it does is less work than to find all that it leaves.
        let mut share = None;
        if params.cuts_by_sum_alone() {
            let all = All::new(params, logits, most)?;
            let wanted = f64::from(params.top_p) * all.total;
            share = Some(wanted);
            for _ in 0..DRAWS {
                let token = drawn.take().or_else(|| all.draw(rng))?;
                if likelier(logits, (most, all.scale), token, (usize::MAX, wanted)).is_some() {
                    return Some(token);
                }
            }
        }
        let candidates = kept(params, logits, most, share);
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

/// All tokens with their weights: `e` to the power of how far a logit lies below the largest, in temperatures.
struct All<'a> {
    logits: &'a [f32],
    most: f32,
    scale: f32,
    /// Of each [`CHUNK`] tokens.
    sums: Vec<f32>,
    total: f64,
}

impl<'a> All<'a> {
    /// None when something among them is no number.
    fn new(params: &SamplingParams, logits: &'a [f32], most: f32) -> Option<Self> {
        let scale = 1.0 / params.temperature;
        let sums = weight_sums(logits, most, scale);
        let total = sums.iter().map(|&sum| f64::from(sum)).sum::<f64>();
        total.is_finite().then_some(Self {
            logits,
            most,
            scale,
            sums,
            total,
        })
    }

    /// First the chunk, then the token in it.
    fn draw(&self, rng: &mut StdRng) -> Option<usize> {
        let mut point = rng.random::<f64>() * self.total;
        let mut buffer = [0.0; CHUNK];
        let mut last = None;
        for (index, (chunk, &sum)) in self.logits.chunks(CHUNK).zip(&self.sums).enumerate() {
            if point >= f64::from(sum) {
                point -= f64::from(sum);
                continue;
            }
            let buffer = &mut buffer[..chunk.len()];
            weights(chunk, self.most, self.scale, buffer);
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
}

/// How many tokens are likelier than `token`, and their weight; of two alike the first in the vocabulary is. None when they are
/// as many as the first bound, or weigh as much as the second.
fn likelier(
    logits: &[f32],
    (most, scale): (f32, f32),
    token: usize,
    bounds: (usize, f64),
) -> Option<(usize, f64)> {
    let own = logits[token];
    let (mut count, mut sum) = (0, 0.0);
    each_weight(logits, (most, scale), own, |other, logit, weight| {
        if logit > own || other < token {
            count += 1;
            sum += f64::from(weight);
        }
        count < bounds.0 && sum < bounds.1
    })
    .then_some((count, sum))
}

/// Logits and tokens of at most `count` that come after `token`, the likeliest first.
fn next_likeliest(logits: &[f32], token: usize, count: usize) -> Vec<(f32, usize)> {
    let own = logits[token];
    let mut next: Vec<(f32, usize)> = Vec::with_capacity(count + 1);
    if count == 0 {
        return next;
    }
    // What has less is not among them.
    let mut floor = f32::MIN;
    for (index, chunk) in logits.chunks(LOOK).enumerate() {
        if !chunk.iter().fold(false, |any, &logit| any | (logit >= floor)) {
            continue;
        }
        for (offset, &logit) in chunk.iter().enumerate() {
            let other = index * LOOK + offset;
            let comes_after = logit < own || (logit == own && other > token);
            if !(comes_after && logit >= floor) {
                continue;
            }
            let place = next.partition_point(|&(likelier, _)| likelier >= logit);
            next.insert(place, (logit, other));
            if next.len() > count {
                next.pop();
            }
            if next.len() == count {
                floor = next[count - 1].0;
            }
        }
    }
    next
}

/// Calls `found` with each token whose logit is `floor` at least, the logit and its weight, for as long as it says true. Whether it
/// said so to the end.
fn each_weight(
    logits: &[f32],
    (most, scale): (f32, f32),
    floor: f32,
    mut found: impl FnMut(usize, f32, f32) -> bool,
) -> bool {
    let mut buffer = [0.0; LOOK];
    for (index, chunk) in logits.chunks(LOOK).enumerate() {
        // Without a branch for each: few chunks hold any.
        if !chunk.iter().fold(false, |any, &logit| any | (logit >= floor)) {
            continue;
        }
        let buffer = &mut buffer[..chunk.len()];
        weights(chunk, most, scale, buffer);
        for (offset, (&logit, &weight)) in chunk.iter().zip(&*buffer).enumerate() {
            if logit >= floor && !found(index * LOOK + offset, logit, weight) {
                return false;
            }
        }
    }
    true
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
    let most = *logits.get(argmax(logits)?)?;
    let own = *logits.get(token as usize)?;
    let scale = 1.0 / params.temperature;
    let weight = |logit: f32| ((logit - most) * scale).exp();
    let ranks = if params.top_k > 0 {
        params.top_k as usize
    } else {
        usize::MAX
    };
    if weight(own) < params.min_p || weight(own).is_nan() {
        return None;
    }
    // Each of the others weighs less than the token itself, and so many count at most.
    let count = known.len() + most_open;
    let share = f64::from(params.top_p);
    let bound = if params.cuts_by_sum() {
        f64::from(weight(own)) * (count + 1) as f64 * share / (1.0 - share)
    } else {
        f64::INFINITY
    };
    let (rank, likelier) = likelier(logits, (most, scale), token as usize, (ranks, bound))?;
    if !params.cuts_by_sum() {
        return Some(Vec::new());
    }
    let others = next_likeliest(logits, token as usize, (ranks - rank - 1).min(count));
    let mut wanted = likelier * (1.0 - share) / share - f64::from(weight(own));
    let mut open = Vec::new();
    for (logit, other) in others {
        if wanted < 0.0 || weight(logit) < params.min_p {
            break;
        }
        wanted -= f64::from(weight(logit));
        if !known.contains(&(other as u32)) {
            open.push(other as u32);
        }
    }
    (wanted < 0.0 && open.len() <= most_open).then_some(open)
}

/// Those that `top_k`, `min_p` and `top_p` leave, with their weights. `share`: the weight that `top_p` leaves where nothing else
/// leaves anything out, of all tokens; else it is of those that the others leave.
fn kept(params: &SamplingParams, logits: &[f32], most: f32, share: Option<f64>) -> Vec<(f32, usize)> {
    let [shallow, deep] = DEPTHS;
    let mut candidates = if params.min_p > 0.0 {
        // The best has weight 1, so a weight is relative to it already.
        let mut likely = within(params, logits, most, (-params.min_p.ln() + 0.1).min(deep));
        likely.retain(|(weight, _)| *weight >= params.min_p);
        likely
    } else {
        let likely = within(params, logits, most, shallow);
        let suffice = match share {
            Some(wanted) => total(&likely) >= wanted,
            None => params.top_k > 0 && likely.len() >= params.top_k as usize,
        };
        if suffice {
            likely
        } else {
            within(params, logits, most, deep)
        }
    };
    if params.top_k > 0 {
        leave_likeliest(&mut candidates, params.top_k as usize);
    }
    if params.cuts_by_sum() {
        let wanted = share.unwrap_or_else(|| f64::from(params.top_p) * total(&candidates));
        leave_sum(&mut candidates, wanted);
    }
    candidates
}

/// Leaves the `count` likeliest, in any order.
fn leave_likeliest(candidates: &mut Vec<(f32, usize)>, count: usize) {
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count, by_weight);
        candidates.truncate(count);
    }
}

/// Leaves the likeliest up to the one with which their weights reach `wanted`, in any order and without sorting them all.
fn leave_sum(candidates: &mut Vec<(f32, usize)>, mut wanted: f64) {
    // Those before `start` are left; the one looked for is before `end`.
    let (mut start, mut end) = (0, candidates.len());
    while end - start > 1 {
        let open = &mut candidates[start..end];
        let half = open.len() / 2;
        open.select_nth_unstable_by(half, by_weight);
        let sum = total(&open[..half]);
        if sum >= wanted {
            end = start + half;
        } else {
            wanted -= sum;
            start += half;
        }
    }
    candidates.truncate(end);
}

/// The likeliest first; of two alike, the first in the vocabulary.
fn by_weight(a: &(f32, usize), b: &(f32, usize)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// Tokens whose logits lie at most `depth` temperatures below the best, with their weights beside it.
fn within(params: &SamplingParams, logits: &[f32], most: f32, depth: f32) -> Vec<(f32, usize)> {
    let (floor, scale) = (most - depth * params.temperature, 1.0 / params.temperature);
    let mut candidates = Vec::new();
    each_weight(logits, (most, scale), floor, |token, _, weight| {
        candidates.push((weight, token));
        true
    });
    candidates
}

fn total(candidates: &[(f32, usize)]) -> f64 {
    candidates.iter().map(|(weight, _)| f64::from(*weight)).sum()
}

//! The blocks of ggml's formats, taken apart: numbers from 0 up, with scales and minimums.
//! Source: ggml's reference dequantisation (ggml-quants.c).

use candle_core::quantized::GgmlDType;
use half::f16;

use super::rows::BLOCK;

/// Thirty-two weights: x = scale * factor * (q - offset) + minimum * minimum factor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unpacked {
    /// At most 2^bits - 1.
    pub(super) numbers: [u8; BLOCK],
    /// Scale and minimum as the file has them: of this block, or (K formats) of 256 weights.
    pub(super) scale: f16,
    pub(super) minimum: f16,
    /// Factors of each half, for scale and minimum; 1 in formats without.
    pub(super) factors: [i8; 2],
    pub(super) minimum_factors: [i8; 2],
}

impl Unpacked {
    /// Scale of a half.
    pub(super) fn scale_of(&self, half: usize) -> f32 {
        self.scale.to_f32() * f32::from(self.factors[half])
    }

    /// What is added in a half.
    pub(super) fn minimum_of(&self, half: usize) -> f32 {
        self.minimum.to_f32() * f32::from(self.minimum_factors[half])
    }
}

const NOTHING: Unpacked = Unpacked {
    numbers: [0; BLOCK],
    scale: f16::ZERO,
    minimum: f16::ZERO,
    factors: [1; 2],
    minimum_factors: [1; 2],
};

/// Takes apart one block of the file; calls `give` for every 32 weights in it, in order.
///
/// `bytes` must be as long as the format's block.
pub(super) fn unpack(dtype: GgmlDType, bytes: &[u8], mut give: impl FnMut(Unpacked)) {
    match dtype {
        GgmlDType::Q4_0 => give(legacy(bytes, false, false)),
        GgmlDType::Q4_1 => give(legacy(bytes, true, false)),
        GgmlDType::Q5_0 => give(legacy(bytes, false, true)),
        GgmlDType::Q5_1 => give(legacy(bytes, true, true)),
        GgmlDType::Q8_0 => give(Unpacked {
            numbers: std::array::from_fn(|i| bytes[2 + i] ^ 0x80),
            scale: float(bytes, 0),
            ..NOTHING
        }),
        GgmlDType::Q4K => k4_or_k5(bytes, None, &bytes[16..], give),
        GgmlDType::Q5K => k4_or_k5(bytes, Some(&bytes[16..48]), &bytes[48..], give),
        GgmlDType::Q6K => k6(bytes, give),
        GgmlDType::Q3K => k3(bytes, give),
        GgmlDType::Q2K => k2(bytes, give),
        // The caller has matched the format already.
        _ => {}
    }
}

fn float(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Q4_0, Q4_1, Q5_0, Q5_1: scale, minimum if any, high bits if any, then nibbles of both halves.
fn legacy(bytes: &[u8], minimum: bool, high: bool) -> Unpacked {
    let mut at = 2;
    let least = if minimum { float(bytes, 2) } else { f16::ZERO };
    at += if minimum { 2 } else { 0 };
    let mut bits = 0;
    if high {
        bits = u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        at += 4;
    }
    let nibbles = &bytes[at..at + 16];
    let mut numbers = [0; BLOCK];
    for (i, &byte) in nibbles.iter().enumerate() {
        numbers[i] = byte & 15 | ((bits >> i & 1) as u8) << 4;
        numbers[i + 16] = byte >> 4 | ((bits >> (i + 16) & 1) as u8) << 4;
    }
    Unpacked {
        numbers,
        scale: float(bytes, 0),
        minimum: least,
        ..NOTHING
    }
}

/// Scale and minimum number `index` of 8, six bits each, in twelve bytes.
fn scale_and_minimum(packed: &[u8], index: usize) -> (u8, u8) {
    if index < 4 {
        (packed[index] & 63, packed[index + 4] & 63)
    } else {
        (
            packed[index + 4] & 15 | packed[index - 4] >> 6 << 4,
            packed[index + 4] >> 4 | packed[index] >> 6 << 4,
        )
    }
}

fn k4_or_k5(bytes: &[u8], high: Option<&[u8]>, nibbles: &[u8], mut give: impl FnMut(Unpacked)) {
    let (scale, minimum) = (float(bytes, 0), float(bytes, 2));
    for index in 0..8 {
        let (s, m) = scale_and_minimum(&bytes[4..16], index);
        let part = &nibbles[index / 2 * 32..][..32];
        let mut numbers: [u8; BLOCK] = std::array::from_fn(|i| part[i] >> (4 * (index % 2)) & 15);
        if let Some(high) = high {
            for (number, bits) in numbers.iter_mut().zip(high) {
                *number |= (bits >> index & 1) << 4;
            }
        }
        give(Unpacked {
            numbers,
            scale,
            minimum: -minimum,
            factors: [s.cast_signed(); 2],
            minimum_factors: [m.cast_signed(); 2],
        });
    }
}

fn k6(bytes: &[u8], mut give: impl FnMut(Unpacked)) {
    let scale = float(bytes, 208);
    for index in 0..8 {
        let (half, part) = (index / 4, index % 4);
        let low = &bytes[half * 64 + part % 2 * 32..][..32];
        let high = &bytes[128 + half * 32..][..32];
        let numbers =
            std::array::from_fn(|i| low[i] >> (part / 2 * 4) & 15 | (high[i] >> (2 * part) & 3) << 4);
        let scales = &bytes[192 + 2 * index..][..2];
        give(Unpacked {
            numbers,
            scale,
            factors: [scales[0].cast_signed(), scales[1].cast_signed()],
            ..NOTHING
        });
    }
}

fn k3(bytes: &[u8], mut give: impl FnMut(Unpacked)) {
    let (mask, twos, packed) = (&bytes[..32], &bytes[32..96], &bytes[96..108]);
    let scale = float(bytes, 108);
    let factor = |j: usize| {
        let low = if j < 8 { packed[j] & 15 } else { packed[j - 8] >> 4 };
        let high = packed[8 + j % 4] >> (2 * (j / 4)) & 3;
        (low | high << 4).cast_signed() - 32
    };
    for index in 0..8 {
        let (half, part) = (index / 4, index % 4);
        let numbers =
            std::array::from_fn(|i| twos[half * 32 + i] >> (2 * part) & 3 | (mask[i] >> index & 1) << 2);
        give(Unpacked {
            numbers,
            scale,
            factors: [factor(2 * index), factor(2 * index + 1)],
            ..NOTHING
        });
    }
}

fn k2(bytes: &[u8], mut give: impl FnMut(Unpacked)) {
    let (scales, twos) = (&bytes[..16], &bytes[16..80]);
    let (scale, minimum) = (float(bytes, 80), float(bytes, 82));
    for index in 0..8 {
        let (half, part) = (index / 4, index % 4);
        let numbers = std::array::from_fn(|i| twos[half * 32 + i] >> (2 * part) & 3);
        let pair = [scales[2 * index], scales[2 * index + 1]];
        give(Unpacked {
            numbers,
            scale,
            minimum: -minimum,
            factors: pair.map(|s| (s & 15).cast_signed()),
            minimum_factors: pair.map(|s| (s >> 4).cast_signed()),
        });
    }
}

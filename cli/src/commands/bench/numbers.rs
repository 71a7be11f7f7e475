//! The arithmetic of the figures, and the report that they make. Pure.

use serde::Serialize;

/// Everything that was measured. This is what `--json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of this program.
    pub version: &'static str,
    /// The engine alone; absent when only a gateway was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineFigures>,
    /// The whole path; absent when it was not asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpFigures>,
}

/// The engine in this process, with nothing between.
#[derive(Clone, Debug, Serialize)]
pub struct EngineFigures {
    /// What the model is, for the eye.
    pub model: String,
    /// Bytes of its file.
    pub file_bytes: u64,
    /// Threads that computed; absent: as many as the process may keep busy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
    /// What computed: `cpu`, `cuda` or `metal`.
    pub device: &'static str,
    /// Vector instructions that the CPU's kernels were of; what a GPU leaves to the CPU runs on them too.
    pub instructions: String,
    /// How finely activations were rounded: `standard` or `high`.
    pub precision: &'static str,
    /// Milliseconds from opening the file to the end of the first forward pass.
    pub load_ms: Samples,
    /// Bytes of this process in memory after the load; absent where the system does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resident_loaded_bytes: Option<u64>,
    /// The same after the work, the KV cache that it filled included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resident_worked_bytes: Option<u64>,
    /// Bytes a second that the threads read from memory; absent when it was not asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes_per_second: Option<f64>,
    /// Tokens/s of reading a prompt.
    pub prefill: Pace,
    /// Tokens/s of writing, all sequences together; one entry a number of sequences.
    pub decode: Vec<Pace>,
}

/// How fast something went.
#[derive(Clone, Debug, Serialize)]
pub struct Pace {
    /// Sequences that ran together.
    pub sequences: usize,
    /// Tokens of each.
    pub tokens: usize,
    /// Tokens/s of all together.
    pub tokens_per_second: Samples,
}

/// The whole path: client, gateway, worker.
#[derive(Clone, Debug, Serialize)]
pub struct HttpFigures {
    /// Base address of the gateway.
    pub base_url: String,
    /// Name on the bus.
    pub model: String,
    /// One entry a number of chats that ran at once.
    pub chats: Vec<ChatFigures>,
}

/// Chats that ran at once.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChatFigures {
    /// How many at once.
    pub concurrent: usize,
    /// Answers in all.
    pub answers: usize,
    /// Tokens of all answers.
    pub tokens: u64,
    /// Tokens/s of all together, from the first request to the end of the last answer.
    pub tokens_per_second: f64,
    /// Half of the answers began within this many milliseconds.
    pub first_token_p50_ms: f64,
    /// Nineteen of twenty answers began within this many milliseconds.
    pub first_token_p95_ms: f64,
}

/// One figure, measured several times.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Samples {
    /// The middle one.
    pub median: f64,
    /// Each, in the order in which they were taken.
    pub each: Vec<f64>,
}

impl Samples {
    /// From what was measured.
    #[must_use]
    pub fn new(each: Vec<f64>) -> Self {
        Self {
            median: median(&each),
            each,
        }
    }
}

/// The middle number; of an even count the mean of the two in the middle. Not a number when there is none.
#[must_use]
pub fn median(numbers: &[f64]) -> f64 {
    let sorted = sorted(numbers);
    let upper = sorted.get(sorted.len() / 2);
    let lower = sorted.get(sorted.len().saturating_sub(1) / 2);
    match (lower, upper) {
        (Some(lower), Some(upper)) => f64::midpoint(*lower, *upper),
        _ => f64::NAN,
    }
}

/// The smallest number that at least `percent` of all are not above (the nearest-rank percentile). Not a
/// number when there is none.
#[must_use]
pub fn percentile(numbers: &[f64], percent: usize) -> f64 {
    let sorted = sorted(numbers);
    let rank = (sorted.len() * percent.min(100)).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}

fn sorted(numbers: &[f64]) -> Vec<f64> {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// How many a second; not a number when no time went by, which no table can show as a speed.
#[must_use]
pub fn rate(count: f64, seconds: f64) -> f64 {
    if seconds > 0.0 { count / seconds } else { f64::NAN }
}

/// Bytes of weights that decoding one sequence reads in a second, taking it that each token reads the whole
/// file once: right where the embedding is the output matrix too, a little too much elsewhere.
#[must_use]
pub fn weights_read(file_bytes: u64, tokens_per_second: f64) -> f64 {
    file_bytes as f64 * tokens_per_second
}

/// One answer through the gateway.
#[derive(Clone, Copy, Debug)]
pub struct AnswerTimes {
    /// Tokens of the answer.
    pub tokens: u64,
    /// Seconds from the request to the first piece of text; None when it had none.
    pub first_seconds: Option<f64>,
}

/// Figures of chats that took `seconds` together.
#[must_use]
pub fn chat_figures(concurrent: usize, answers: &[AnswerTimes], seconds: f64) -> ChatFigures {
    let tokens = answers.iter().map(|answer| answer.tokens).sum::<u64>();
    let firsts: Vec<f64> = answers
        .iter()
        .filter_map(|answer| Some(answer.first_seconds? * 1000.0))
        .collect();
    ChatFigures {
        concurrent,
        answers: answers.len(),
        tokens,
        tokens_per_second: rate(tokens as f64, seconds),
        first_token_p50_ms: percentile(&firsts, 50),
        first_token_p95_ms: percentile(&firsts, 95),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_or_the_mean_of_the_two_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[7.0]), 7.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn a_percentile_is_one_of_the_numbers_and_never_below_its_share() {
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&hundred, 50), 50.0);
        assert_eq!(percentile(&hundred, 95), 95.0);
        assert_eq!(percentile(&hundred, 100), 100.0);
        // Of eight answers the slowest is the p95: nothing is made up between two of them.
        let eight: Vec<f64> = (1..=8).map(f64::from).collect();
        assert_eq!(percentile(&eight, 95), 8.0);
        assert_eq!(percentile(&eight, 50), 4.0);
        assert_eq!(percentile(&eight, 0), 1.0);
        assert!(percentile(&[], 95).is_nan());
    }

    #[test]
    fn no_time_gives_no_speed() {
        assert_eq!(rate(10.0, 2.0), 5.0);
        assert!(rate(10.0, 0.0).is_nan());
    }

    #[test]
    fn chats_are_counted_together_and_answers_without_text_have_no_first_token() {
        let answer = |tokens, first_seconds| AnswerTimes {
            tokens,
            first_seconds,
        };
        let answers = [answer(30, Some(0.25)), answer(50, Some(0.125)), answer(0, None)];
        let figures = chat_figures(2, &answers, 4.0);
        assert_eq!((figures.concurrent, figures.answers, figures.tokens), (2, 3, 80));
        assert_eq!(figures.tokens_per_second, 20.0);
        assert_eq!(figures.first_token_p50_ms, 125.0);
        assert_eq!(figures.first_token_p95_ms, 250.0);
    }
}

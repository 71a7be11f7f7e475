//! A second, smaller model that guesses what the first will write.
//!
//! ```text
//! step:  catch up with what was written ─▶ one token for all ─▶ the next ─▶ … ─▶ guesses, checked by the model
//! ```
//! It has a cache of its own, in which nothing is shared; where that is full, or its text is not read yet,
//! there is no guess. Sequences know nothing of it but the guess: what became of that is seen in the next one.
//! Source: Leviathan et al. 2023; Chen et al. 2023 (with a draft's likeliest token, checked by the sampler).

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::sequence::Sequence;
use super::success::{Price, Success};
use crate::device::Runner;
use crate::kernels::vector::argmax;
use crate::kv::{BlockTable, KvCache};
use crate::model::Row;

/// Rows of texts that are read in one step: a long prompt must not hold up those who write.
const CATCH_UP_ROWS: usize = 64;
/// Weight of the newest time.
const NEWEST: f32 = 0.1;

/// The second model and what it has read.
pub(crate) struct DraftModel {
    decoder: Runner,
    cache: KvCache,
    /// Tokens that there are: a model may have more rows than words.
    words: usize,
    readers: HashMap<u64, Reader>,
    /// Seconds that guessing one token took, and that a step of the model takes.
    guess_seconds: Option<f32>,
    step_seconds: Option<f32>,
}

/// What it knows of one sequence.
#[derive(Default)]
struct Reader {
    table: BlockTable,
    /// Tokens of the text that are in the cache.
    read: usize,
    /// Guesses after those.
    guess: Vec<u32>,
    /// How many of the guesses are in the cache too.
    guesses_read: usize,
    success: Success,
}

/// One that is guessed for in this step.
struct Guessing {
    /// Its index among those that run.
    index: usize,
    most: usize,
    guess: Vec<u32>,
}

impl DraftModel {
    pub(crate) fn new(decoder: Runner, cache: KvCache, words: usize) -> Self {
        Self {
            decoder,
            cache,
            words,
            readers: HashMap::new(),
            guess_seconds: None,
            step_seconds: None,
        }
    }

    /// Takes note of how long a step of the model took in which nothing was read.
    pub(super) fn step_took(&mut self, time: Duration) {
        self.step_seconds = Some(mix(self.step_seconds, time));
    }

    /// Gives the memory of texts that are done back to the machine.
    pub(super) fn rest(&mut self) {
        self.forget(|_| false);
        self.cache.trim();
    }

    /// Guesses for every sequence that writes and has no better guess. `price` is that of a guess which costs nothing.
    ///
    /// # Errors
    /// What went wrong; the guesses of this step are none then, and it had better not be asked again.
    pub(super) fn guess(&mut self, running: &mut [Sequence], mut price: Price) -> Result<(), String> {
        self.forget(|number| running.iter().any(|one| one.number == number));
        price.guess = match (self.guess_seconds, self.step_seconds) {
            (Some(guess), Some(step)) => guess / step,
            _ => 0.0,
        };
        let mut guessing = Vec::new();
        let mut reading = CATCH_UP_ROWS;
        let mut step = Vec::new();
        for (index, sequence) in running.iter().enumerate() {
            if !sequence.wants_guess() {
                continue;
            }
            let reader = self.readers.entry(sequence.number).or_default();
            reader.look_back(&sequence.tokens);
            let most = sequence.room_for_guess().min(reader.success.next(price));
            let missing = sequence.tokens.len() - reader.read;
            let count = missing.min(reading);
            let end = reader.read + count;
            if most == 0 || count == 0 {
                continue;
            }
            if !self.cache.reserve(&mut reader.table, end + most) {
                continue;
            }
            reading -= count;
            let complete = count == missing;
            for position in reader.read..end {
                step.push(Row {
                    token: sequence.tokens[position],
                    position,
                    sequence: index,
                    wants_logits: complete && position + 1 == end,
                    of_prompt: false,
                });
            }
            reader.read = end;
            if complete {
                guessing.push(Guessing {
                    index,
                    most,
                    guess: Vec::new(),
                });
            }
        }
        while !step.is_empty() {
            let begun = Instant::now();
            let wanted = step.iter().filter(|row| row.wants_logits).count();
            let alone = step.len() == wanted;
            self.forward(&step, running)?;
            let size = self.decoder.config().vocab_size.max(1);
            step.clear();
            let mut logits = self.decoder.logits().chunks_exact(size);
            for one in guessing.iter_mut().filter(|one| one.guess.len() < one.most) {
                let words = logits.next().and_then(|row| row.get(..self.words));
                let Some(token) = words.and_then(argmax) else {
                    continue;
                };
                let token = token as u32;
                one.guess.push(token);
                if one.guess.len() < one.most {
                    step.push(Row {
                        token,
                        position: running[one.index].tokens.len() + one.guess.len() - 1,
                        sequence: one.index,
                        wants_logits: true,
                        of_prompt: false,
                    });
                }
            }
            if alone && wanted > 0 {
                self.guess_seconds = Some(mix(self.guess_seconds, begun.elapsed()));
            }
        }
        for one in guessing {
            let sequence = &mut running[one.index];
            if let Some(reader) = self.readers.get_mut(&sequence.number) {
                reader.guesses_read = one.guess.len().saturating_sub(1);
                reader.guess.clone_from(&one.guess);
            }
            sequence.set_guess(one.guess);
        }
        Ok(())
    }

    fn forward(&mut self, rows: &[Row], running: &[Sequence]) -> Result<(), String> {
        let nothing = BlockTable::default();
        let readers = &self.readers;
        let tables: Vec<&BlockTable> = running
            .iter()
            .map(|one| readers.get(&one.number).map_or(&nothing, |reader| &reader.table))
            .collect();
        let (decoder, cache) = (&mut self.decoder, &mut self.cache);
        catch_unwind(AssertUnwindSafe(|| decoder.forward(rows, &tables, cache)))
            .map_err(|_| "a kernel stopped at an assertion".to_owned())?
            .map_err(|error| format!("the device failed: {error}"))
    }

    /// Forgets those that do not run any more.
    fn forget(&mut self, runs: impl Fn(u64) -> bool) {
        let cache = &mut self.cache;
        self.readers.retain(|&number, reader| {
            let stays = runs(number);
            if !stays {
                cache.release(&mut reader.table);
            }
            stays
        });
    }
}

impl Reader {
    /// Sees what became of the latest guess.
    fn look_back(&mut self, tokens: &[u32]) {
        let written = tokens.get(self.read..).unwrap_or_default();
        let hits = self
            .guess
            .iter()
            .zip(written)
            .take_while(|(guessed, written)| guessed == written)
            .count();
        // Of one that was dropped before it was checked, only what was written since can be judged.
        self.success.came_true(self.guess.len().min(written.len()), hits);
        // The last token is always read again: what follows it is wanted.
        self.read = (self.read + hits.min(self.guesses_read)).min(tokens.len() - 1);
        self.guess.clear();
        self.guesses_read = 0;
    }
}

fn mix(before: Option<f32>, now: Duration) -> f32 {
    let now = now.as_secs_f32();
    before.map_or(now, |before| before + NEWEST * (now - before))
}

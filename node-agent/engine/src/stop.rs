//! Stop strings, found even where they lie across tokens.

/// Holds text back as long as it may be the beginning of a stop string.
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    /// For these strings; empty ones are ignored.
    #[must_use]
    pub fn new(stops: &[String]) -> Self {
        Self {
            stops: stops.iter().filter(|stop| !stop.is_empty()).cloned().collect(),
            held: String::new(),
        }
    }

    /// Adds text. Gives what can be shown, and whether a stop string ended the answer (which is not shown).
    pub fn push(&mut self, text: &str) -> (String, bool) {
        if self.stops.is_empty() {
            return (text.to_owned(), false);
        }
        self.held.push_str(text);
        let found = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()))
            .min();
        if let Some(at) = found {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self
            .stops
            .iter()
            .map(|stop| overlap(&self.held, stop))
            .max()
            .unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back and turned out to be no stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes at the end of `text` that begin `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    (1..=longest)
        .rev()
        .find(|&count| stop.is_char_boundary(count) && text.ends_with(&stop[..count]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(|&s| s.to_owned()).collect();
        let (mut strings, mut out) = (StopStrings::new(&stops), String::new());
        for piece in pieces {
            let (text, stopped) = strings.push(piece);
            out.push_str(&text);
            if stopped {
                return (out, true);
            }
        }
        out.push_str(&strings.finish());
        (out, false)
    }

    #[test]
    fn a_stop_string_across_pieces_ends_the_answer_and_is_not_shown() {
        assert_eq!(
            run(&["END"], &["abc E", "N", "D and more"]),
            ("abc ".into(), true)
        );
        assert_eq!(run(&["END", "c"], &["ab", "c E", "ND"]), ("ab".into(), true));
    }

    #[test]
    fn a_beginning_that_leads_nowhere_is_shown() {
        assert_eq!(run(&["END"], &["E", "N", "X"]), ("ENX".into(), false));
        assert_eq!(run(&["END"], &["EEN"]), ("EEN".into(), false));
        assert_eq!(run(&["éé"], &["é", "x"]), ("éx".into(), false));
    }
}

//! Text out of bytes that come in pieces: a character split over two tokens comes out whole.

/// Collects bytes and gives out whole characters.
#[derive(Clone, Debug, Default)]
pub struct Utf8Stream {
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// Adds bytes and gives the text that is complete now. Bytes that can never become a character come
    /// out as U+FFFD at once.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut consumed = 0;
        while let Some(rest) = self.pending.get(consumed..).filter(|rest| !rest.is_empty()) {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    consumed = self.pending.len();
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(rest.get(..valid).unwrap_or_default()));
                    consumed += valid;
                    // None: the end of the bytes may be the beginning of a character.
                    let Some(broken) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    consumed += broken;
                }
            }
        }
        self.pending.drain(..consumed);
        text
    }

    /// What is left at the end: an unfinished character, as U+FFFD.
    pub fn finish(&mut self) -> String {
        let rest = std::mem::take(&mut self.pending);
        String::from_utf8_lossy(&rest).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_give_the_same_text_as_the_whole(text: String, cuts in prop::collection::vec(0_usize..64, 0..8)) {
            let (mut stream, mut out, mut rest) = (Utf8Stream::default(), String::new(), text.as_bytes());
            for cut in cuts {
                let (head, tail) = rest.split_at(cut.min(rest.len()));
                out.push_str(&stream.push(head));
                rest = tail;
            }
            out.push_str(&stream.push(rest));
            out.push_str(&stream.finish());
            prop_assert_eq!(out, text);
        }

        #[test]
        fn any_bytes_become_text(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..6), 0..8)) {
            let mut stream = Utf8Stream::default();
            let mut out: String = pieces.iter().map(|piece| stream.push(piece)).collect();
            out.push_str(&stream.finish());
            prop_assert_eq!(out, String::from_utf8_lossy(&pieces.concat()).into_owned());
        }
    }
}

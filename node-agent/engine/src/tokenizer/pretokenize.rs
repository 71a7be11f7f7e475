//! Cutting text into words before BPE, by the rules that each family of models was trained with. Which name in a
//! file means which rules: llama.cpp's `llama-vocab.cpp`, whose converter writes the names.

use fancy_regex::Regex;

use crate::InvalidModel;

/// GPT-2: contractions, letters, digits, the rest, spaces. Source: openai/gpt-2 encoder.py.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3: up to three digits at a time. Source: its tokenizer.json.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2: digits one by one. Source: its tokenizer.json.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Mistral's Tekken: words begin anew where a capital follows a small letter; digits one by one. Source: the
/// tokenizer.json of Mistral-Nemo-Instruct-2407.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-4o, which Phi 4 mini took over: as Tekken, with contractions and up to three digits. Source: its tokenizer.json.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// What llama.cpp does with files that name no rules: signs by themselves, then GPT-2's words, then numbers by
/// themselves and three digits at a time. Each of these cuts what those before it left.
const UNNAMED: &[&str] = &[r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"];

/// What a name in `tokenizer.ggml.pre` stands for.
pub(super) struct Family {
    names: &'static [&'static str],
    rules: &'static [&'static str],
    single_digits: bool,
    /// A word that is a token as it stands is not taken apart.
    pub(super) whole_words: bool,
    /// Texts begin with the beginning token unless the file says otherwise.
    pub(super) begins: bool,
}

const PLAIN: Family = Family {
    names: &[],
    rules: &[],
    single_digits: false,
    whole_words: false,
    begins: false,
};

const FAMILIES: &[Family] = &[
    Family {
        names: &["default"],
        rules: UNNAMED,
        ..PLAIN
    },
    Family {
        names: &[
            "gpt-2",
            "gpt2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
            "mellum",
        ],
        rules: &[GPT2],
        ..PLAIN
    },
    Family {
        names: &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        rules: &[GPT2],
        single_digits: true,
        ..PLAIN
    },
    Family {
        names: &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "pixtral",
            "midm-2.0",
            "lfm2",
        ],
        rules: &[LLAMA3],
        whole_words: true,
        begins: true,
        ..PLAIN
    },
    Family {
        names: &["dbrx", "smaug-bpe"],
        rules: &[LLAMA3],
        ..PLAIN
    },
    Family {
        names: &[
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
        ],
        rules: &[QWEN2],
        ..PLAIN
    },
    Family {
        names: &["tekken"],
        rules: &[TEKKEN],
        whole_words: true,
        begins: true,
        ..PLAIN
    },
    Family {
        names: &["gpt-4o", "llama4", "kanana2"],
        rules: &[GPT4O],
        ..PLAIN
    },
];

/// The family with this name.
pub(super) fn family(name: &str) -> Result<&'static Family, InvalidModel> {
    FAMILIES
        .iter()
        .find(|family| family.names.contains(&name))
        .ok_or_else(|| {
            let names: Vec<&str> = FAMILIES.iter().flat_map(|family| family.names).copied().collect();
            InvalidModel::unsupported("tokenizer.ggml.pre", name, names.join(", "))
        })
}

/// The rules of one family.
pub(super) struct Pretokenizer {
    rules: Vec<Regex>,
    /// Digits are cut off one by one first.
    single_digits: bool,
}

impl Pretokenizer {
    /// The rules with this name in `tokenizer.ggml.pre`.
    pub(super) fn new(name: &str) -> Result<Self, InvalidModel> {
        let family = family(name)?;
        let rules = family.rules.iter().map(|rule| Regex::new(rule));
        let rules = rules
            .collect::<Result<Vec<Regex>, _>>()
            .map_err(|error| InvalidModel::inconsistent("tokenizer.ggml.pre", error, "a known pattern"))?;
        Ok(Self {
            rules,
            single_digits: family.single_digits,
        })
    }

    /// Calls `word` for each word of `text`; together they are the whole text.
    pub(super) fn for_each<'t>(&self, text: &'t str, mut word: impl FnMut(&'t str)) {
        if !self.single_digits {
            return words_of(&self.rules, text, &mut word);
        }
        let mut start = 0;
        for (at, c) in text.char_indices().filter(|(_, c)| c.is_numeric()) {
            words_of(&self.rules, text.get(start..at).unwrap_or_default(), &mut word);
            let end = at + c.len_utf8();
            word(text.get(at..end).unwrap_or_default());
            start = end;
        }
        words_of(&self.rules, text.get(start..).unwrap_or_default(), &mut word);
    }
}

/// Cuts a text by the first rule, and what comes of that by the others: what a rule finds, and what lies between.
fn words_of<'t>(rules: &[Regex], text: &'t str, word: &mut dyn FnMut(&'t str)) {
    if text.is_empty() {
        return;
    }
    let Some((rule, others)) = rules.split_first() else {
        return word(text);
    };
    let mut end = 0;
    for found in rule.find_iter(text) {
        // An error is the regex engine's own limit: what is left is taken as one word.
        let Ok(found) = found else { break };
        words_of(others, text.get(end..found.start()).unwrap_or_default(), word);
        words_of(others, found.as_str(), word);
        end = found.end();
    }
    words_of(others, text.get(end..).unwrap_or_default(), word);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words<'t>(name: &str, text: &'t str) -> Vec<&'t str> {
        let mut words = Vec::new();
        let rules = Pretokenizer::new(name).expect("it is known");
        rules.for_each(text, |word| words.push(word));
        assert_eq!(words.concat(), text);
        words
    }

    /// By hand from the published pattern.
    #[test]
    fn tekken_begins_a_word_at_a_capital() {
        for (text, expected) in [
            ("HelloWorld fooBar", &["Hello", "World", " foo", "Bar"][..]),
            (
                "I'm 1234 it's",
                &["I", "'m", " ", "1", "2", "3", "4", " it", "'s"],
            ),
            ("HTTPServer //\n/ x", &["HTTPServer", " //\n/", " x"]),
            ("Łódź, ÉCOLE", &["Łódź", ",", " ÉCOLE"]),
            ("नमस्ते 東京", &["नमस्ते", " 東京"]),
            ("a  b\n\n c", &["a", " ", " b", "\n\n", " c"]),
        ] {
            assert_eq!(words("tekken", text), expected, "{text:?}");
        }
    }

    /// By hand from llama.cpp's four patterns: no contractions, no space before signs, digits by threes.
    #[test]
    fn a_file_that_names_no_rules_is_read_as_llama_cpp_reads_it() {
        for (text, expected) in [
            ("I'm here.", &["I", "'", "m", " here", "."][..]),
            ("pay $12345 now", &["pay", " ", "$", "123", "45", " now"]),
            ("a ++b", &["a", " ", "++", "b"]),
            ("x  y\n", &["x", " ", " y", "\n"]),
            ("²³ 2", &["²³", " ", "2"]),
        ] {
            assert_eq!(words("default", text), expected, "{text:?}");
        }
    }

    #[test]
    fn unknown_rules_are_refused_with_those_that_are_known() {
        let refused = Pretokenizer::new("gemma4").err().expect("unknown").to_string();
        assert!(
            refused.contains("gemma4") && refused.contains("tekken"),
            "{refused}"
        );
    }
}

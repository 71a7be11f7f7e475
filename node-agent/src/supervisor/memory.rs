//! Who gets memory: a decision over what each instance holds, with its arithmetic.

use freehold_rules::plan::memory::mib;

/// What an instance holds now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Holding {
    pub(super) name: String,
    pub(super) bytes: u64,
    /// It is on its way out.
    pub(super) leaving: bool,
    /// On demand, without a request: it can be sent to sleep. The larger, the longer it has been idle.
    pub(super) idle_ms: Option<u128>,
}

/// What is decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    Admitted,
    /// Memory comes free, once these are asleep.
    Wait {
        message: String,
        evict: Vec<String>,
    },
    Refused {
        message: String,
    },
}

/// Whether `needed` bytes can be had out of `allocatable`. `arithmetic` says how `needed` came about.
pub(super) fn admit(needed: u64, arithmetic: &str, allocatable: u64, holdings: &[Holding]) -> Admission {
    let held: u64 = holdings.iter().map(|holding| holding.bytes).sum();
    let free = allocatable.saturating_sub(held);
    if needed <= free {
        return Admission::Admitted;
    }
    let names: Vec<_> = holdings
        .iter()
        .map(|holding| format!("{} {}", holding.name, mib(holding.bytes)))
        .collect();
    let holders = if names.is_empty() {
        String::new()
    } else {
        format!(" (held: {})", names.join(", "))
    };
    let wants = format!(
        "needs {} ({arithmetic}); {} of {} are free{holders}",
        mib(needed),
        mib(free),
        mib(allocatable)
    );
    let mut coming: u64 = holdings
        .iter()
        .filter(|holding| holding.leaving)
        .map(|holding| holding.bytes)
        .sum();
    let mut sleepers: Vec<_> = holdings
        .iter()
        .filter(|holding| !holding.leaving && holding.idle_ms.is_some())
        .collect();
    sleepers.sort_by_key(|holding| std::cmp::Reverse(holding.idle_ms));
    let mut evict = Vec::new();
    for sleeper in sleepers {
        if needed <= free + coming {
            break;
        }
        coming += sleeper.bytes;
        evict.push(sleeper.name.clone());
    }
    if needed <= free + coming {
        return Admission::Wait {
            message: format!("{wants}; waiting for {} that come free", mib(coming)),
            evict,
        };
    }
    let advice = "lower engine.contextLength or engine.concurrency, use a smaller model, or raise the agent's --memory-limit";
    Admission::Refused {
        message: format!("{wants}; {advice}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn holding(name: &str, mib: u64) -> Holding {
        Holding {
            name: name.to_owned(),
            bytes: mib * MIB,
            leaving: false,
            idle_ms: None,
        }
    }

    #[test]
    fn what_fits_is_admitted_and_what_never_fits_refused_with_its_arithmetic() {
        assert_eq!(admit(100 * MIB, "a + b", 100 * MIB, &[]), Admission::Admitted);
        let Admission::Refused { message } = admit(101 * MIB, "90 + 11", 100 * MIB, &[holding("x", 40)])
        else {
            panic!("not refused")
        };
        assert!(
            message.starts_with("needs 101 MiB (90 + 11); 60 MiB of 100 MiB are free (held: x 40 MiB)"),
            "{message}"
        );
    }

    #[test]
    fn it_waits_for_those_who_leave_before_it_sends_others_to_sleep() {
        let leaving = Holding {
            leaving: true,
            ..holding("old", 50)
        };
        let asleep = |name, idle| Holding {
            idle_ms: Some(idle),
            ..holding(name, 30)
        };
        let all = [leaving, asleep("short", 1), asleep("long", 9)];
        let evicted = |needed| match admit(needed * MIB, "", 110 * MIB, &all) {
            Admission::Wait { evict, .. } => evict,
            other => panic!("{other:?}"),
        };
        assert!(evicted(50).is_empty());
        assert_eq!(evicted(80), ["long"]);
        assert_eq!(evicted(110), ["long", "short"]);
    }

    #[test]
    fn busy_models_keep_their_memory() {
        assert!(matches!(
            admit(80 * MIB, "", 100 * MIB, &[holding("busy", 60)]),
            Admission::Refused { .. }
        ));
    }
}

//! The figures for people.

use freehold_crds::energy::{EnergyMeter, EnergyReport, EnergyUse};

use super::JOULES_PER_KILOWATT_HOUR;

/// Below this many tokens a figure for a million of them is chance.
const FEWEST_TOKENS: u64 = 100;

/// Joules for a million tokens; None where too few were counted to tell.
#[must_use]
pub fn joules_per_million_tokens(used: EnergyUse) -> Option<f64> {
    (used.tokens >= FEWEST_TOKENS).then(|| used.joules as f64 * 1e6 / used.tokens as f64)
}

/// Money for a million tokens, at this price of a kilowatt hour.
#[must_use]
pub fn cost_per_million_tokens(used: EnergyUse, price_per_kilowatt_hour: f64) -> Option<f64> {
    joules_per_million_tokens(used).map(|joules| joules / JOULES_PER_KILOWATT_HOUR * price_per_kilowatt_hour)
}

/// What a deployment draws, from what its replicas were charged with. `replicas` gives for each its machine,
/// that machine's counters (None: its agent told nothing yet) and its own share.
#[must_use]
pub fn deployment_energy(
    replicas: &[(&str, Option<&EnergyMeter>, Option<EnergyUse>)],
) -> Option<EnergyReport> {
    let reasons: Vec<String> = replicas
        .iter()
        .filter_map(|(node, meter, used)| {
            let meter = (*meter)?;
            match (&meter.reason, used) {
                (Some(reason), _) => Some(format!("{node}: {reason}")),
                (None, None) => Some(format!("{node}: no counter covers the device in use")),
                (None, Some(_)) => None,
            }
        })
        .collect();
    let measured: Vec<(&EnergyMeter, EnergyUse)> = replicas
        .iter()
        .filter_map(|(_, meter, used)| Some(((*meter)?, (*used)?)))
        .collect();
    if measured.is_empty() {
        let reason = reasons.join("; ");
        return (!reason.is_empty()).then(|| EnergyReport {
            reason: Some(reason),
            ..EnergyReport::default()
        });
    }
    let total = EnergyUse {
        joules: measured.iter().map(|(_, used)| used.joules).sum(),
        tokens: measured.iter().map(|(_, used)| used.tokens).sum(),
    };
    let mut reasons = reasons;
    let per_million = joules_per_million_tokens(total);
    if per_million.is_none() {
        reasons.push(format!(
            "{} tokens were measured; figures for a million begin at {FEWEST_TOKENS}",
            total.tokens
        ));
    }
    let money = match money(&measured, total) {
        Ok(money) => money,
        Err(reason) => {
            reasons.push(reason);
            None
        }
    };
    let summary = per_million.map(|joules| {
        let cost = money.as_ref();
        let cost = cost.map_or_else(String::new, |(cost, currency)| format!(" and {cost} {currency}"));
        format!("{}{} per million tokens", energy_text(joules), cost.trim_end())
    });
    Some(EnergyReport {
        summary,
        joules: Some(total.joules),
        tokens: Some(total.tokens),
        joules_per_million_tokens: per_million.map(|joules| joules.round() as u64),
        cost_per_million_tokens: money.as_ref().map(|(cost, _)| cost.clone()),
        currency: money
            .map(|(_, currency)| currency)
            .filter(|currency| !currency.is_empty()),
        reason: (!reasons.is_empty()).then(|| reasons.join("; ")),
    })
}

/// Cost for a million tokens and its currency. Every machine's joules are counted at its own price.
fn money(
    measured: &[(&EnergyMeter, EnergyUse)],
    total: EnergyUse,
) -> Result<Option<(String, String)>, String> {
    let mut spent = 0.0;
    let mut currency: Option<&str> = None;
    for (meter, used) in measured {
        let price = meter.price_per_kilowatt_hour.as_deref();
        let Some(price) = price.and_then(|price| price.parse::<f64>().ok()) else {
            return Err("no price of a kilowatt hour is set (--energy-price of the agent)".to_owned());
        };
        let here = meter.currency.as_deref().unwrap_or_default();
        if *currency.get_or_insert(here) != here {
            return Err("the machines have prices in different currencies".to_owned());
        }
        spent += used.joules as f64 / JOULES_PER_KILOWATT_HOUR * price;
    }
    if joules_per_million_tokens(total).is_none() {
        return Ok(None);
    }
    let cost = spent * 1e6 / total.tokens as f64;
    Ok(Some((
        format!("{cost:.4}"),
        currency.unwrap_or_default().to_owned(),
    )))
}

fn energy_text(joules: f64) -> String {
    if joules >= 10_000.0 {
        format!("{:.0} kJ", joules / 1000.0)
    } else {
        format!("{joules:.0} J")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meter(price: Option<&str>) -> EnergyMeter {
        EnergyMeter {
            counters: vec!["package-0".to_owned()],
            price_per_kilowatt_hour: price.map(str::to_owned),
            currency: price.map(|_| "EUR".to_owned()),
            ..EnergyMeter::default()
        }
    }

    fn used(joules: u64, tokens: u64) -> Option<EnergyUse> {
        Some(EnergyUse { joules, tokens })
    }

    #[test]
    fn half_a_joule_a_token_is_half_a_megajoule_a_million() {
        let meter = meter(Some("0.36"));
        let report = deployment_energy(&[("pi", Some(&meter), used(500, 1000))]).expect("a report");
        assert_eq!(report.joules_per_million_tokens, Some(500_000));
        // 500 kJ are 0.1389 kWh.
        assert_eq!(report.cost_per_million_tokens.as_deref(), Some("0.0500"));
        assert_eq!(
            report.summary.as_deref(),
            Some("500 kJ and 0.0500 EUR per million tokens")
        );
        assert_eq!(report.reason, None);
    }

    #[test]
    fn without_a_counter_there_is_a_reason_and_no_figure() {
        let meter = EnergyMeter {
            reason: Some("no counter".to_owned()),
            ..EnergyMeter::default()
        };
        let report = deployment_energy(&[("pi", Some(&meter), None)]).expect("a report");
        assert_eq!(report.reason.as_deref(), Some("pi: no counter"));
        assert_eq!((report.joules, report.joules_per_million_tokens), (None, None));
        assert_eq!(
            deployment_energy(&[("pi", None, None)]),
            None,
            "nothing is known yet"
        );
    }

    #[test]
    fn joules_stand_without_a_price_and_few_tokens_give_no_figure() {
        let meter = meter(None);
        let report = deployment_energy(&[("pi", Some(&meter), used(500, 1000))]).expect("a report");
        assert_eq!(report.joules_per_million_tokens, Some(500_000));
        assert!(report.reason.expect("a reason").contains("--energy-price"));
        let report = deployment_energy(&[("pi", Some(&meter), used(5, 10))]).expect("a report");
        assert_eq!((report.joules, report.joules_per_million_tokens), (Some(5), None));
    }

    #[test]
    fn each_machine_counts_at_its_own_price() {
        let (dear, cheap) = (meter(Some("0.72")), meter(Some("0.36")));
        let replicas = [
            ("a", Some(&dear), used(500, 1000)),
            ("b", Some(&cheap), used(500, 1000)),
        ];
        let report = deployment_energy(&replicas).expect("a report");
        assert_eq!(report.cost_per_million_tokens.as_deref(), Some("0.0750"));
    }
}

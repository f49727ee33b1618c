//! Numbers for people: digits in groups, and SI prefixes. Files and JSON have neither.

use std::collections::BTreeMap;

/// `1 234 567`, with narrow spaces that keep the number together.
#[must_use]
pub fn grouped(number: i128) -> String {
    let digits = number.unsigned_abs().to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3 + 1);
    if number < 0 {
        text.push('-');
    }
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

const PREFIXES: [(f64, &str); 6] = [
    (1e15, "P"),
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
    (1.0, ""),
];

/// `12.3 M` + unit: three to four digits and a prefix.
#[must_use]
pub fn scaled(value: f64, unit: &str) -> String {
    if value == 0.0 || !value.is_finite() {
        return format!("{value} {unit}").trim_end().to_owned();
    }
    let (factor, prefix) = PREFIXES
        .into_iter()
        .find(|(factor, _)| value.abs() >= *factor)
        .unwrap_or((1.0, ""));
    let number = value / factor;
    let decimals = match number.abs() {
        n if n >= 100.0 => 1,
        n if n >= 10.0 => 2,
        _ => 3,
    };
    let number = format!("{number:.decimals$}");
    let number = if number.contains('.') {
        number.trim_end_matches('0').trim_end_matches('.')
    } else {
        &number
    };
    format!("{number} {prefix}{unit}").trim_end().to_owned()
}

/// Picojoules with a prefix that fits.
#[must_use]
pub(crate) fn energy(picojoules: f64) -> String {
    const UNITS: [(f64, &str); 5] = [
        (1e12, "J"),
        (1e9, "mJ"),
        (1e6, "uJ"),
        (1e3, "nJ"),
        (1.0, "pJ"),
    ];
    let (factor, unit) = UNITS
        .into_iter()
        .find(|(factor, _)| picojoules.abs() >= *factor)
        .unwrap_or((1.0, "pJ"));
    scaled_plain(picojoules / factor, unit)
}

fn scaled_plain(value: f64, unit: &str) -> String {
    let text = format!("{value:.3}");
    format!(
        "{} {unit}",
        text.trim_end_matches('0').trim_end_matches('.')
    )
}

/// A mean: exact where it is whole, else four significant places after the point.
#[must_use]
pub(crate) fn mean(value: f64) -> String {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        #[expect(clippy::cast_possible_truncation, reason = "whole and small")]
        let whole = value as i128;
        return grouped(whole);
    }
    if value.abs() >= 1e4 {
        scaled(value, "")
    } else {
        format!("{value:.4}").trim_end_matches('0').to_owned()
    }
}

/// A share that is never rounded up to all.
pub(crate) fn percent(share: f64) -> String {
    let text = format!("{:.1} %", share * 100.0);
    if share < 1.0 && text == "100.0 %" {
        "99.9 %".to_owned()
    } else {
        text
    }
}

/// Names with how often they occur, the most frequent first, ten at most.
pub(crate) fn frequent(names: &BTreeMap<String, u64>) -> String {
    let mut names: Vec<(&String, &u64)> = names.iter().collect();
    names.sort_by(|a, b| b.1.cmp(a.1).then_with(|| a.0.cmp(b.0)));
    let mut parts: Vec<String> = names
        .iter()
        .take(10)
        .map(|(name, times)| format!("{name} ({times})"))
        .collect();
    if names.len() > 10 {
        parts.push(format!(
            "and {} more (all of them in --format json)",
            names.len() - 10
        ));
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(-1_234_567), "-1 234 567");
        assert_eq!(scaled(1_234_567.0, "FLOP"), "1.235 MFLOP");
        assert_eq!(scaled(12.0, ""), "12");
        assert_eq!(scaled(0.0, "pJ"), "0 pJ");
        assert_eq!(energy(4028.4), "4.028 nJ");
        assert_eq!(energy(0.0), "0 pJ");
        assert_eq!(energy(2.5e12), "2.5 J");
        assert_eq!(mean(21_420.0), "21 420");
        assert_eq!(mean(1.25), "1.25");
    }
}

//! What a sweep goes through: `KEY=8..1024:log:16`, `KEY=4,8,16`.

use std::fmt;

/// More values than anybody looks at.
const MOST_VALUES: u64 = 10_000_000;

/// A key and its values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Axis {
    /// The key, perhaps behind the name of a model or a counter and a dot.
    pub key: String,
    /// The values, as they are set.
    pub values: Vec<String>,
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} values)", self.key, self.values.len())
    }
}

impl Axis {
    /// Parses `KEY=VALUES`: values between commas, or `FROM..TO:log:COUNT`, `FROM..TO:lin:COUNT`, both ends taken.
    ///
    /// # Errors
    /// Where the text is none of these, a value stands there twice, or there are more than ten million.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (key, values) = text
            .split_once('=')
            .map(|(key, values)| (key.trim(), values.trim()))
            .filter(|(key, values)| !key.is_empty() && !values.is_empty())
            .ok_or_else(|| {
                format!("'{text}' is no sweep: write bits=4,8,16 or sram_kib=8..1024:log:16")
            })?;
        let values = if values.contains("..") && !values.contains(',') {
            range(values)?
        } else {
            list(values)?
        };
        let mut sorted: Vec<&String> = values.iter().collect();
        sorted.sort_unstable();
        if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("'{text}': {} stands there twice", twice[0]));
        }
        Ok(Self {
            key: key.to_owned(),
            values,
        })
    }
}

/// Values between commas; those inside of brackets belong to a value.
fn list(text: &str) -> Result<Vec<String>, String> {
    let mut values = vec![String::new()];
    let mut depth = 0i32;
    for c in text.chars() {
        match c {
            '[' | '{' => depth += 1,
            ']' | '}' => depth -= 1,
            _ => {}
        }
        match values.last_mut() {
            Some(value) if c != ',' || depth > 0 => value.push(c),
            _ => values.push(String::new()),
        }
    }
    for value in &mut values {
        *value = value.trim().to_owned();
    }
    if values.iter().any(String::is_empty) {
        return Err(format!("'{text}' has an empty value between its commas"));
    }
    Ok(values)
}

fn range(text: &str) -> Result<Vec<String>, String> {
    let wrong = |what: &str| {
        format!("'{text}': {what}; write FROM..TO:log:COUNT or FROM..TO:lin:COUNT")
    };
    let mut parts = text.split(':');
    let ends = parts.next().unwrap_or("");
    let (spacing, count, None) = (parts.next(), parts.next(), parts.next()) else {
        return Err(wrong("too many colons"));
    };
    let (from, to) = ends.split_once("..").ok_or_else(|| wrong("no range"))?;
    let number = |end: &str| {
        end.trim()
            .parse::<f64>()
            .ok()
            .filter(|n| n.is_finite())
            .ok_or_else(|| wrong(&format!("'{end}' is no number")))
    };
    let (from, to) = (number(from)?, number(to)?);
    let logarithmic = match spacing.map(str::trim) {
        Some("log") => true,
        Some("lin") => false,
        Some(other) => return Err(wrong(&format!("'{other}' is neither log nor lin"))),
        None => return Err(wrong("it does not say how many values")),
    };
    let count: u64 = count
        .and_then(|count| count.trim().parse().ok())
        .filter(|count| *count >= 2)
        .ok_or_else(|| wrong("the number of values is a whole one of at least 2"))?;
    if count > MOST_VALUES {
        return Err(wrong(&format!("a sweep has at most {MOST_VALUES} values")));
    }
    if logarithmic && (from <= 0.0 || to <= 0.0) {
        return Err(wrong("on a logarithmic scale both ends are above 0"));
    }
    #[expect(clippy::cast_precision_loss, reason = "ten million at most")]
    let value = |at: u64| match at {
        0 => from,
        _ if at == count - 1 => to,
        _ => {
            let share = at as f64 / (count - 1) as f64;
            rounded(if logarithmic {
                from * (to / from).powf(share)
            } else {
                from + (to - from) * share
            })
        }
    };
    Ok((0..count).map(|at| value(at).to_string()).collect())
}

/// To twelve digits, so that 16 is 16, and the same on every machine.
fn rounded(value: f64) -> f64 {
    format!("{value:.11e}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn values(text: &str) -> Vec<String> {
        Axis::parse(text).unwrap().values
    }

    fn message(text: &str) -> String {
        Axis::parse(text).unwrap_err()
    }

    #[test]
    fn lists_and_ranges() {
        assert_eq!(values("bits = 4, 8,16"), ["4", "8", "16"]);
        assert_eq!(values("device=rram,sram"), ["rram", "sram"]);
        assert_eq!(
            values("sram_kib=8..1024:log:8"),
            ["8", "16", "32", "64", "128", "256", "512", "1024"]
        );
        assert_eq!(values("e_mac_pj=0.1..0.5:lin:5"), ["0.1", "0.2", "0.3", "0.4", "0.5"]);
        assert_eq!(values("x=2..1:lin:2"), ["2", "1"]);
        assert_eq!(values("x=[[0, 1]],[[0, 2]]"), ["[[0, 1]]", "[[0, 2]]"]);
        assert_eq!(values("x=5pJ"), ["5pJ"]);
    }

    #[test]
    fn what_is_no_sweep_is_told() {
        assert!(message("bits").contains("write bits=4,8,16"));
        assert!(message("x=1,,2").contains("empty value"));
        assert!(message("x=1,2,1").contains("1 stands there twice"));
        assert!(message("x=1..2").contains("how many values"));
        assert!(message("x=1..2:log").contains("whole one of at least 2"));
        assert!(message("x=1..2:log:1").contains("at least 2"));
        assert!(message("x=1..2:exp:3").contains("neither log nor lin"));
        assert!(message("x=0..2:log:3").contains("above 0"));
        assert!(message("x=a..2:lin:3").contains("'a' is no number"));
        assert!(message("x=1..2:lin:3:4").contains("too many colons"));
        assert!(message("x=1..2:lin:100000000000").contains("at most 10000000"));
        assert!(message("x=1..1:lin:3").contains("twice"));
    }

    proptest! {
        #[test]
        fn ranges_rise_from_end_to_end(from in 1u32..1000, more in 1u32..1000, count in 2usize..50, logarithmic: bool) {
            let to = from + more;
            let spacing = if logarithmic { "log" } else { "lin" };
            let values = values(&format!("x={from}..{to}:{spacing}:{count}"));
            prop_assert_eq!(values.len(), count);
            let numbers: Vec<f64> = values.iter().map(|v| v.parse().unwrap()).collect();
            prop_assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert_eq!((numbers[0], numbers[count - 1]), (f64::from(from), f64::from(to)));
        }

        #[test]
        fn any_text_is_a_sweep_or_none(text in "[a-z0-9.,:=\\[\\]login]{0,24}") {
            let _ = Axis::parse(&text);
        }
    }
}

//! What is recorded of modules beside their ops: as flags give it, and as the attach glue reads it.

use serde::{Deserialize, Serialize};

/// How much of modules is recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Facts, and when calls begin and end.
    #[default]
    Usual,
    /// Also the tensors of calls, and assignments to the states of neurons.
    Full,
}

impl Level {
    /// As flags and traces spell it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Usual => "usual",
            Self::Full => "full",
        }
    }
}

/// What is kept of watched values, beside their statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Keep {
    /// Nothing.
    #[default]
    Nothing,
    /// Values of which all elements are 0 or 1, a bit for each.
    Spikes,
    /// All values.
    Values,
}

impl Keep {
    /// As flags and traces spell it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Spikes => "spikes",
            Self::Values => "values",
        }
    }
}

/// Something about some modules: `PATTERN:NAME,NAME...`. The pattern is a class, a module's name, or a glob over these.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selection {
    /// Which modules.
    pub pattern: String,
    /// What of them.
    pub names: Vec<String>,
}

impl std::str::FromStr for Selection {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let example = "for example LIFNode:v or 'Net.fc*:input,output'";
        let Some((pattern, names)) = text.rsplit_once(':') else {
            return Err(format!(
                "there is no colon between modules and names; {example}"
            ));
        };
        let names: Vec<String> = names.split(',').map(|n| n.trim().to_owned()).collect();
        if pattern.is_empty() {
            return Err(format!("no modules stand before the colon; {example}"));
        }
        if let Some(odd) = names.iter().find(|n| !is_name(n)) {
            return Err(format!("{odd:?} is no name of an attribute; {example}"));
        }
        Ok(Self {
            pattern: pattern.to_owned(),
            names,
        })
    }
}

/// An identifier of Python, or several with dots between.
fn is_name(text: &str) -> bool {
    text.split('.').all(|part| {
        part.starts_with(|c: char| c.is_alphabetic() || c == '_')
            && part.chars().all(|c| c.is_alphanumeric() || c == '_')
    })
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detail {
    /// Of all modules.
    pub level: Level,
    /// Attributes that hold states of neurons, beside those that are known.
    pub states: Vec<Selection>,
    /// What is watched of which modules.
    pub watches: Vec<Selection>,
    /// What is kept of it, and of the outputs of spiking neurons.
    pub keep: Keep,
}

impl Detail {
    /// As `OPTAPE_DETAIL` says it to the glue.
    pub(super) fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Selection, String> {
        text.parse()
    }

    #[test]
    fn selections() {
        let both = parse("features.*.conv:input, grad_output").unwrap();
        assert_eq!(both.pattern, "features.*.conv");
        assert_eq!(both.names, ["input", "grad_output"]);
        assert_eq!(parse("a::B:mem").unwrap().pattern, "a::B");
        assert!(parse("IFNode").unwrap_err().contains("no colon"));
        assert!(parse(":v").unwrap_err().contains("no modules"));
        assert!(parse("IFNode:").unwrap_err().contains("\"\" is no name"));
        assert!(
            parse("IFNode:v,2")
                .unwrap_err()
                .contains("\"2\" is no name")
        );
    }

    #[test]
    fn the_glue_reads_json() {
        let detail = Detail {
            level: Level::Full,
            states: vec![parse("LIF:mem").unwrap()],
            watches: vec![parse("*:input,v.before").unwrap()],
            keep: Keep::Spikes,
        };
        assert_eq!(
            detail.to_json(),
            r#"{"level":"full","states":[{"pattern":"LIF","names":["mem"]}],"watches":[{"pattern":"*","names":["input","v.before"]}],"keep":"spikes"}"#
        );
    }
}

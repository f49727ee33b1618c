//! What a machine can do at most: measured by `optape peak`, or from its data sheet.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{ReplayError, position};

/// What a machine can do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peaks {
    /// Which machine.
    pub machine: String,
    /// How the numbers came about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Its roofs; the first is the one that points are held against.
    #[serde(rename = "roof")]
    pub roofs: Vec<Roof>,
}

/// A peak of arithmetic and one of memory, which hold together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Roof {
    /// `2 cores, float32`.
    pub name: String,
    /// Operations per second; a fused multiply-add is two.
    pub flop_per_s: f64,
    /// Bytes per second, read and written.
    pub bytes_per_s: f64,
}

impl Roof {
    /// Operations per byte from which on arithmetic is the limit.
    #[must_use]
    pub fn ridge_flop_per_byte(&self) -> f64 {
        self.flop_per_s / self.bytes_per_s
    }

    /// What it allows at so many operations per byte.
    #[must_use]
    pub fn attainable_flop_per_s(&self, flop_per_byte: f64) -> f64 {
        self.flop_per_s.min(flop_per_byte * self.bytes_per_s)
    }
}

impl Peaks {
    /// One roof, from a data sheet.
    ///
    /// # Errors
    /// Where a number is not above zero.
    pub fn given(flop_per_s: f64, bytes_per_s: f64) -> Result<Self, ReplayError> {
        let peaks = Self {
            machine: "given".to_owned(),
            source: None,
            roofs: vec![Roof {
                name: "given".to_owned(),
                flop_per_s,
                bytes_per_s,
            }],
        };
        peaks.check().map_err(ReplayError::Selection)?;
        Ok(peaks)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// Where it cannot be read, or as [`Self::parse`].
    pub fn read(path: &Path) -> Result<Self, ReplayError> {
        let text = std::fs::read_to_string(path).map_err(|source| ReplayError::Io {
            path: path.to_path_buf(),
            source,
        })?;
        Self::parse(&text, &path.display().to_string())
    }

    /// Parses a file's text; `path` is for messages.
    ///
    /// # Errors
    /// [`ReplayError::Costs`] with line and column of the mistake.
    pub fn parse(text: &str, path: &str) -> Result<Self, ReplayError> {
        let wrong = |at: usize, message: String| {
            let (line, column) = position(text, at);
            ReplayError::Costs {
                path: path.to_owned(),
                line,
                column,
                message,
            }
        };
        let peaks: Self = toml::from_str(text).map_err(|error| {
            wrong(
                error.span().map_or(0, |span| span.start),
                error.message().to_owned(),
            )
        })?;
        peaks.check().map_err(|message| wrong(0, message))?;
        Ok(peaks)
    }

    fn check(&self) -> Result<(), String> {
        if self.roofs.is_empty() {
            return Err("there is no [[roof]]".to_owned());
        }
        for (at, roof) in self.roofs.iter().enumerate() {
            for (key, value) in [
                ("flop_per_s", roof.flop_per_s),
                ("bytes_per_s", roof.bytes_per_s),
            ] {
                if !value.is_finite() || value <= 0.0 {
                    return Err(format!(
                        "{key} of the roof '{}' is {value}; it is a finite number above 0",
                        roof.name
                    ));
                }
            }
            if self.roofs.iter().skip(at + 1).any(|r| r.name == roof.name) {
                return Err(format!("two roofs are named '{}'", roof.name));
            }
        }
        Ok(())
    }

    /// As a file.
    ///
    /// # Errors
    /// None for peaks that are valid: all of it can be written as TOML.
    pub fn to_toml(&self) -> Result<String, ReplayError> {
        toml::to_string(self).map_err(|error| ReplayError::Write(std::io::Error::other(error)))
    }

    /// A roof by name.
    ///
    /// # Errors
    /// Where there is none.
    pub fn named(&self, name: &str) -> Result<&Roof, ReplayError> {
        self.roofs
            .iter()
            .find(|roof| roof.name == name)
            .ok_or_else(|| {
                let known = self.roofs.iter().map(|roof| roof.name.as_str());
                ReplayError::unknown_name("roof", name, known)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "machine = \"a\"\n[[roof]]\nname = \"r\"\nflop_per_s = 1e11\nbytes_per_s = 20000000000\n";

    #[test]
    fn a_file_is_read_and_written_alike() {
        let peaks = Peaks::parse(TEXT, "p.toml").unwrap();
        assert_eq!(
            peaks,
            Peaks::parse(&peaks.to_toml().unwrap(), "p.toml").unwrap()
        );
        let roof = peaks.named("r").unwrap();
        assert!((roof.ridge_flop_per_byte() - 5.0).abs() < 1e-12);
        assert!((roof.attainable_flop_per_s(1.0) - 2e10).abs() < 1.0);
        assert!((roof.attainable_flop_per_s(100.0) - 1e11).abs() < 1.0);
    }

    #[test]
    fn mistakes_are_told_with_their_place() {
        let message = |from: &str, to: &str| {
            Peaks::parse(&TEXT.replace(from, to), "p.toml")
                .unwrap_err()
                .to_string()
        };
        let misspelt = message("flop_per_s", "flops_per_s");
        assert!(
            misspelt.starts_with("p.toml:4:1: unknown field `flops_per_s`"),
            "{misspelt}"
        );
        assert!(message("1e11", "-1.0").contains("is -1; it is a finite number above 0"));
        assert!(message("1e11", "nan").contains("is NaN"));
        assert!(message("1e11", "\"many\"").starts_with("p.toml:4:14: "));
        assert!(message("machine = \"a\"\n", "").contains("missing field `machine`"));
        let none = Peaks::parse("machine = \"a\"\nroof = []\n", "p.toml").unwrap_err();
        assert!(none.to_string().contains("there is no [[roof]]"));
        let twice = format!("{TEXT}{}", TEXT.replace("machine = \"a\"\n", ""));
        let twice = Peaks::parse(&twice, "p.toml").unwrap_err().to_string();
        assert!(twice.contains("two roofs are named 'r'"), "{twice}");
        assert!(Peaks::given(0.0, 1.0).is_err());
    }
}

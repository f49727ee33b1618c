//! Which steps are recorded: `--steps 100..200`, `--every 50`.

use optape_trace::StepSource;

use super::CaptureError;

/// The steps to record: of `first..end` every `every`th, counted from `first`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Schedule {
    /// The first step.
    pub first: u64,
    /// The first step that is not recorded any more; `None`: to the end.
    pub end: Option<u64>,
    /// One of so many steps; at least 1.
    pub every: u64,
    /// What counts as a step.
    pub by: StepsBy,
}

/// What counts as a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum StepsBy {
    /// Steps that the program marks; else optimizer steps; else, in a program that has neither, root-module calls that do not train.
    ///
    /// A training call of the root module is no step of its own: its optimizer step is still to come, and gradient accumulation
    /// or a second network would make several calls one step.
    #[default]
    Auto,
    /// Optimizer steps.
    Optimizer,
    /// Calls of the root module.
    Call,
    /// Steps that the program marks.
    Program,
}

impl StepsBy {
    /// As the flag spells it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Optimizer => "optimizer",
            Self::Call => "call",
            Self::Program => "program",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [Self::Auto, Self::Optimizer, Self::Call, Self::Program]
            .into_iter()
            .find(|by| by.name() == name)
    }
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            first: 0,
            end: None,
            every: 1,
            by: StepsBy::Auto,
        }
    }
}

/// How many steps of each kind have ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepCounts {
    /// By [`StepSource`].
    pub by_source: [u64; 3],
    /// Root-module calls that had begun and ended without training: in eval mode or without gradients.
    pub inferences: u64,
}

impl StepCounts {
    /// The number of steps that ended, as `by` counts them.
    #[must_use]
    pub fn steps(&self, by: StepsBy) -> u64 {
        let of = |source: StepSource| self.by_source[source as usize];
        match by {
            StepsBy::Optimizer => of(StepSource::Optimizer),
            StepsBy::Call => of(StepSource::RootCall),
            StepsBy::Program => of(StepSource::Program),
            StepsBy::Auto => [of(StepSource::Program), of(StepSource::Optimizer)]
                .into_iter()
                .find(|steps| *steps > 0)
                .unwrap_or(self.inferences),
        }
    }
}

impl Schedule {
    /// Whether the step that runs now is recorded.
    #[must_use]
    pub fn records(&self, counts: &StepCounts) -> bool {
        let step = counts.steps(self.by);
        step >= self.first
            && self.end.is_none_or(|end| step < end)
            && (step - self.first).is_multiple_of(self.every)
    }
}

/// As it travels in `OPTAPE_SCHEDULE`: `FIRST..END/EVERY@BY`, END empty where there is none.
impl std::fmt::Display for Schedule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}..", self.first)?;
        if let Some(end) = self.end {
            write!(f, "{end}")?;
        }
        write!(f, "/{}@{}", self.every, self.by.name())
    }
}

impl std::str::FromStr for Schedule {
    type Err = CaptureError;

    fn from_str(text: &str) -> Result<Self, CaptureError> {
        let read = || {
            let (steps, rest) = text.split_once('/')?;
            let (every, by) = rest.split_once('@')?;
            let (first, end) = steps.split_once("..")?;
            let end = match end {
                "" => None,
                end => Some(end.parse().ok()?),
            };
            Some(Self {
                first: first.parse().ok()?,
                end,
                every: every.parse().ok().filter(|every| *every > 0)?,
                by: StepsBy::from_name(by)?,
            })
        };
        read().ok_or_else(|| {
            CaptureError::Settings(format!(
                "OPTAPE_SCHEDULE={text}: it reads FIRST..END/EVERY@BY"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(program: u64, optimizer: u64, calls: u64, inferences: u64) -> StepCounts {
        let mut by_source = [0; 3];
        by_source[StepSource::Program as usize] = program;
        by_source[StepSource::Optimizer as usize] = optimizer;
        by_source[StepSource::RootCall as usize] = calls;
        StepCounts {
            by_source,
            inferences,
        }
    }

    #[test]
    fn steps_in_a_range() {
        let schedule = Schedule {
            first: 2,
            end: Some(9),
            every: 3,
            by: StepsBy::Optimizer,
        };
        let recorded: Vec<u64> = (0..12)
            .filter(|step| schedule.records(&counts(0, *step, 0, 0)))
            .collect();
        assert_eq!(recorded, [2, 5, 8]);
    }

    #[test]
    fn what_counts_as_a_step() {
        assert_eq!(counts(0, 0, 4, 0).steps(StepsBy::Auto), 0);
        assert_eq!(counts(0, 0, 4, 3).steps(StepsBy::Auto), 3);
        assert_eq!(counts(0, 2, 4, 3).steps(StepsBy::Auto), 2);
        assert_eq!(counts(7, 2, 4, 3).steps(StepsBy::Auto), 7);
        assert_eq!(counts(7, 2, 4, 3).steps(StepsBy::Call), 4);
    }

    #[test]
    fn it_travels_as_text() {
        for schedule in [
            Schedule::default(),
            Schedule {
                first: 100,
                end: Some(200),
                every: 50,
                by: StepsBy::Call,
            },
        ] {
            assert_eq!(schedule.to_string().parse::<Schedule>().unwrap(), schedule);
        }
        for bad in ["", "1..2", "1..2/0@auto", "1..2/1@x", "a../1@auto"] {
            assert!(bad.parse::<Schedule>().is_err(), "{bad}");
        }
    }
}

//! Rules, counters, energy models and reports over optape traces.
//!
//! A trace says what ran; this crate says what it would have cost. It needs neither libtorch nor the model, and the
//! same trace can be asked again under other rules, other costs, or for another part of the run.
//!
//! ```no_run
//! use optape_replay::rules::RuleSet;
//! use optape_replay::{Format, Request, Traces, evaluate};
//!
//! let traces = Traces::open(&["train.optape"])?;
//! let report = evaluate(&traces, &RuleSet::named("optape")?, &Request::default())?;
//! report.write(Format::Table, &mut std::io::stdout())?;
//! # Ok::<(), optape_replay::ReplayError>(())
//! ```

#![forbid(unsafe_code)]

mod aggregate;
mod basis;
mod clocks;
pub mod diff;
pub mod energy;
mod error;
mod evaluate;
mod explain;
mod firing;
mod load;
mod monitors;
mod needs;
pub mod ordered;
pub mod report;
pub mod roofline;
pub mod rules;
mod selection;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod timeline;

pub use basis::{Basis, FigureBasis, LayerInput, Sparsity};
pub use error::{ReplayError, nearest, position};
pub use evaluate::{By, Request, Wanted, evaluate};
pub use explain::{Explained, Explanation, explain};
pub use load::{Source, StreamRef, Traces};
pub use monitors::{facts, sample_counts};
pub use needs::{Estimator, Lacking, Needs, RulesNeeds, Standing, needs};
pub use report::{Format, Per, Report};
pub use selection::{Glob, Selection, parse_steps};

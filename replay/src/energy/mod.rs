//! Energy models: counts times published costs. What they give is modelled, never measured.

mod compute;
mod costs;

pub use compute::{ComputeModel, ComputeReport};
pub use costs::{CostFile, PRESETS, preset_text};

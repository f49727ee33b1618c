//! Watched values (T8): which watches are on, and whose values are kept.

use std::sync::atomic::{AtomicBool, Ordering};

use optape_trace::{WatchId, call_flags};

use super::outlet::KeptValue;
use super::{Capture, Failure, HOOK_ONLY, State, measuring, plans};
use crate::abi::{Call, word};

/// Of a watch, beside its statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keep {
    /// Nothing.
    #[default]
    Nothing,
    /// Values of which all elements are 0 or 1.
    Spikes,
    /// All values.
    Values,
}

impl Keep {
    /// As the glue says it: 0, 1, 2.
    #[must_use]
    pub fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Nothing,
            1 => Self::Spikes,
            _ => Self::Values,
        }
    }
}

/// How a watch stands.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Watching {
    off: bool,
    keep: Keep,
    /// Told that its values are too large.
    told: bool,
}

/// Whether any watch is off or keeps values: only then watched calls look closer.
static SPECIAL: AtomicBool = AtomicBool::new(false);

impl Capture {
    /// Says what a watch keeps.
    pub fn keep(&'static self, watch: WatchId, keep: Keep) {
        self.with(|state| {
            state.watching(watch).keep = keep;
            SPECIAL.store(true, Ordering::Release);
            Ok(())
        });
    }

    /// Switches a watch, or all that there are, on or off. Nothing of a watch that is off is recorded.
    pub fn switch_watch(&'static self, watch: Option<WatchId>, on: bool) {
        self.with(|state| {
            match watch {
                Some(watch) => state.watching(watch).off = !on,
                None => {
                    state
                        .watching
                        .resize_with(state.watches.len(), Watching::default);
                    state.watching.iter_mut().for_each(|w| w.off = !on);
                }
            }
            SPECIAL.store(true, Ordering::Release);
            Ok(())
        });
    }

    /// A watched value: a call of `optape::watch`.
    pub(super) fn watched(&'static self, call: &mut Call) {
        let mut kept = None;
        if SPECIAL.load(Ordering::Acquire)
            && self.recording.load(Ordering::Relaxed) != HOOK_ONLY
            && let Some(watch) = watch_of(call)
        {
            let state = self.state.lock();
            let watching = state
                .as_ref()
                .and_then(|s| s.watching.get(watch as usize).copied())
                .unwrap_or_default();
            drop(state);
            if watching.off {
                return;
            }
            if watching.keep != Keep::Nothing && call.flags & call_flags::NOT_EXECUTED == 0 {
                kept = self.value_of(call, watch, watching);
            }
        }
        self.begin(call);
        let Some(kept) = kept else {
            self.end(call);
            return;
        };
        let plan = plans()
            .and_then(|p| p.get(call.op as usize))
            .filter(|plan| plan.looks_after);
        self.end_with_statistics(call, plan, Some(&kept));
    }

    /// The value of a watched call, where it is to be kept. Read outside of the lock.
    fn value_of(&'static self, call: &Call, watch: u32, watching: Watching) -> Option<KeptValue> {
        let tensor = measuring::tensors(call).first()?;
        match measuring::elements(tensor, watching.keep == Keep::Spikes) {
            Ok(elements) => Some(KeptValue {
                watch,
                dtype: tensor.dtype,
                shape: measuring::sizes(tensor)
                    .iter()
                    .map(|size| size.cast_unsigned())
                    .collect(),
                elements: elements?,
            }),
            Err(bytes) => {
                self.with(|state| state.too_large(watch, bytes));
                None
            }
        }
    }
}

impl State {
    fn watching(&mut self, watch: WatchId) -> &mut Watching {
        if self.watching.len() <= watch.index() {
            self.watching
                .resize_with(watch.index() + 1, Watching::default);
        }
        &mut self.watching[watch.index()]
    }

    fn too_large(&mut self, watch: u32, bytes: u64) -> Result<(), Failure> {
        self.dropped_values += 1;
        let watching = self.watching(WatchId(watch));
        if std::mem::replace(&mut watching.told, true) {
            return Ok(());
        }
        let key = self.text(&format!("watch.{watch}.problem"))?;
        let why = format!(
            "\"a value of {bytes} bytes is longer than {} and is not kept\"",
            optape_trace::VALUE_LIMIT
        );
        self.fact(None, key, &why)
    }
}

/// The id that a call of `optape::watch(Tensor, int id)` was made with.
fn watch_of(call: &Call) -> Option<u32> {
    const NO_STRIDES: u64 = 1 << 56;
    let words = measuring::words(call);
    let tensor = *words.first()?;
    let dimensions = if tensor as u8 == word::TENSOR {
        (tensor >> 32 & 0xff) as usize
    } else {
        0
    };
    let lists = if tensor & NO_STRIDES == 0 { 2 } else { 1 };
    let at = 1 + dimensions * lists;
    let id = match *words.get(at)? as u8 {
        word::INT => words.get(at + 1),
        word::INT_PAYLOAD => measuring::payload(call).last(),
        _ => None,
    };
    u32::try_from(*id?).ok()
}

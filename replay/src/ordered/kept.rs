//! Kept values by the ordinal of their call.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;

use optape_trace::{Stream, Trace, TraceError, Value};

/// The values that a stream's watches kept (T8). They stand in frames beside the records; the frame that was read last is remembered, as
/// those who ask go through the stream in its order.
pub struct KeptValues<'a> {
    trace: &'a Trace,
    stream: &'a Stream,
    last: RefCell<Option<(usize, Rc<Vec<Value>>)>>,
    failure: Cell<Option<TraceError>>,
}

impl fmt::Debug for KeptValues<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeptValues")
            .field("frames", &self.stream.values().len())
            .finish_non_exhaustive()
    }
}

impl<'a> KeptValues<'a> {
    pub(crate) fn of(trace: &'a Trace, stream: &'a Stream) -> Self {
        Self {
            trace,
            stream,
            last: RefCell::new(None),
            failure: Cell::new(None),
        }
    }

    /// Whether the stream has any.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.stream.values().is_empty()
    }

    /// The value of a call; `None` where it was not kept. An error of reading is remembered, and ends the pass over the stream.
    #[must_use]
    pub fn get(&self, ordinal: u64) -> Option<Value> {
        match self.find(ordinal) {
            Ok(value) => value,
            Err(error) => {
                self.failure.set(Some(error));
                None
            }
        }
    }

    /// As [`Self::get`].
    ///
    /// # Errors
    /// Where the file cannot be read.
    pub fn find(&self, ordinal: u64) -> Result<Option<Value>, TraceError> {
        let frames = self.stream.values();
        let holds = |at: &usize| {
            frames
                .get(*at)
                .is_some_and(|f| (f.first_ordinal..=f.last_ordinal).contains(&ordinal))
        };
        let last = self.last.borrow().as_ref().map(|(at, _)| *at);
        // The last frame, the one behind it, then any: what a killed daemon left is appended later.
        let near = last.into_iter().flat_map(|at| [at, at + 1]);
        for at in near.chain(0..frames.len()).filter(holds) {
            let found = self
                .frame(at)?
                .iter()
                .find(|value| value.ordinal.0 == ordinal)
                .cloned();
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    fn frame(&self, at: usize) -> Result<Rc<Vec<Value>>, TraceError> {
        if let Some((known, values)) = &*self.last.borrow()
            && *known == at
        {
            return Ok(Rc::clone(values));
        }
        let values = match self.stream.values().get(at) {
            Some(index) => Rc::new(self.trace.values_of(self.stream.id(), index)?),
            None => Rc::default(),
        };
        *self.last.borrow_mut() = Some((at, Rc::clone(&values)));
        Ok(values)
    }

    pub(crate) fn failure(&self) -> Option<TraceError> {
        self.failure.take()
    }
}

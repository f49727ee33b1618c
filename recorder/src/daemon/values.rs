//! Kept values (T8) on their way from the ring to the file: their pieces are put together.

use std::io::Write;

use optape_trace::{DType, Elements, Ordinal, StreamId, TraceWriter, VALUE_LIMIT, Value, WatchId};

use super::intake::Fault;
use crate::ring::ValueMessage;

/// The value of a stream that is being put together. A value follows the op call that it belongs to.
#[derive(Default)]
pub(super) struct Assembly {
    /// The last op call.
    call: Option<Ordinal>,
    /// A value of which pieces are missing, and how many bytes it will have.
    open: Option<(Value, u64)>,
}

impl Assembly {
    /// Values that follow are of this record.
    pub(super) fn follow(&mut self, call: Ordinal) {
        self.call = Some(call);
    }

    /// Whether an op call has come that a value may belong to.
    pub(super) fn has_call(&self) -> bool {
        self.call.is_some()
    }

    /// Takes a piece; writes the value when it is whole. Without a writer nothing is kept.
    pub(super) fn take<W: Write>(
        &mut self,
        id: StreamId,
        piece: &ValueMessage<'_>,
        writer: &mut Option<&mut TraceWriter<W>>,
    ) -> Result<(), Fault> {
        let malformed = |what: &str| Fault::Stream(what.to_owned());
        if piece.total > VALUE_LIMIT as u64 {
            return Err(malformed("a value that is too large"));
        }
        if piece.offset == 0 {
            self.give_up(id, writer)?;
            if writer.is_none() {
                return Ok(());
            }
            let ordinal = self
                .call
                .ok_or_else(|| malformed("a value before any op call"))?;
            let elements = if piece.bits {
                Elements::Bits(Vec::new())
            } else {
                Elements::Raw(Vec::new())
            };
            let value = Value {
                ordinal,
                watch: WatchId(piece.watch),
                dtype: DType(piece.dtype),
                shape: piece.shape.to_vec(),
                elements,
            };
            self.open = Some((value, piece.total));
        }
        let Some((value, total)) = &mut self.open else {
            // Its beginning was written when nothing could be written any more.
            return Ok(());
        };
        let (Elements::Raw(bytes) | Elements::Bits(bytes)) = &mut value.elements else {
            return Err(malformed("a piece of a value that has none"));
        };
        if bytes.len() as u64 != piece.offset || *total != piece.total {
            return Err(malformed("a piece of another value"));
        }
        bytes.extend(piece.words.iter().flat_map(|w| w.to_le_bytes()));
        bytes.truncate((piece.offset + piece.length) as usize);
        if bytes.len() as u64 == *total
            && let Some((value, _)) = self.open.take()
            && let Some(writer) = writer
        {
            writer.value(id, &value)?;
        }
        Ok(())
    }

    /// The pieces that are missing will not come: the value is lost.
    pub(super) fn give_up<W: Write>(
        &mut self,
        id: StreamId,
        writer: &mut Option<&mut TraceWriter<W>>,
    ) -> Result<(), Fault> {
        let Some((value, _)) = self.open.take() else {
            return Ok(());
        };
        if let Some(writer) = writer {
            let lost = Value {
                elements: Elements::Lost,
                ..value
            };
            writer.value(id, &lost)?;
        }
        Ok(())
    }
}

//! Where records leave: the ring, and what has to wait because it was full.
//!
//! A call that does not fit is lost and counted; a definition must not be lost, since later calls name it, nor a fact, since it is told
//! once. So definitions and facts queue up here until there is room, and nothing overtakes them.

use std::collections::VecDeque;

use optape_trace::{Definition, DropReason, Elements, Event, Moment, ThreadId, codec};

use crate::ring::{MessageKind, OpCallMessage, Producer, ValueMessage};

/// Definitions and facts waiting for room may take this much; beyond it the recorder switches itself off.
const WAITING_BYTES: usize = 16 << 20;

/// Bytes of a value that travel in one message.
const LONGEST_PIECE: usize = 64 << 10;

/// A value that is to be kept.
pub(super) struct KeptValue {
    pub(super) watch: u32,
    pub(super) dtype: i8,
    pub(super) shape: Vec<u64>,
    pub(super) elements: Elements,
}

/// The producer's end of the ring with its waiting definitions.
pub(super) struct Outlet {
    ring: Producer,
    waiting: VecDeque<(MessageKind, Vec<u8>)>,
    waiting_bytes: usize,
    /// Reused for encoding.
    scratch: Vec<u8>,
    /// Records that went into the ring: the number of the next one.
    records: u64,
}

/// The outlet cannot keep its promise.
#[derive(Debug, thiserror::Error)]
pub(super) enum OutletError {
    #[error("definitions of {WAITING_BYTES} bytes are waiting for a ring that nobody reads")]
    Waiting,
    #[error("a definition of {0} bytes does not fit into the ring: use a larger one (--ring-size)")]
    TooLarge(usize),
    #[error(transparent)]
    Encode(#[from] optape_trace::TraceError),
}

impl Outlet {
    pub(super) fn new(ring: Producer) -> Self {
        Self {
            ring,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            scratch: Vec::new(),
            records: 0,
        }
    }

    /// The ring's control words.
    #[inline]
    pub(super) fn ring(&self) -> &Producer {
        &self.ring
    }

    pub(super) fn define(&mut self, definition: &Definition) -> Result<(), OutletError> {
        self.scratch.clear();
        codec::encode_into(definition, &mut self.scratch)?;
        self.keep(MessageKind::Definition)
    }

    /// Writes a fact. It is told once, so it is as little to be lost as a definition.
    pub(super) fn fact(&mut self, moment: &Moment) -> Result<(), OutletError> {
        self.scratch.clear();
        codec::encode_into(moment, &mut self.scratch)?;
        self.keep(MessageKind::Moment)
    }

    /// Bytes that a message may have.
    pub(super) fn longest(&self) -> usize {
        self.ring.capacity() / 4
    }

    /// Sends what stands in `scratch`, now or later.
    fn keep(&mut self, kind: MessageKind) -> Result<(), OutletError> {
        if !self.ring.can_hold(1 + self.scratch.len().div_ceil(8)) {
            return Err(OutletError::TooLarge(self.scratch.len()));
        }
        if self.waiting.is_empty() && self.ring.push_bytes(kind, &self.scratch) {
            self.records += u64::from(kind.is_record());
            return Ok(());
        }
        self.waiting_bytes += self.scratch.len();
        self.waiting.push_back((kind, self.scratch.clone()));
        if self.waiting_bytes > WAITING_BYTES {
            Err(OutletError::Waiting)
        } else {
            Ok(())
        }
    }

    /// Writes a message that begins the stream, or a definition-like one that must not be lost silently. False: no room.
    pub(super) fn message(&mut self, kind: MessageKind, bytes: &[u8]) -> bool {
        self.settle() && self.ring.push_bytes(kind, bytes)
    }

    /// Writes the stream's end, behind what is to be said of drops. False: no room; whoever empties the ring ends the stream.
    pub(super) fn end(&mut self, time_ns: u64, bytes: &[u8]) -> bool {
        self.settle()
            && self.tell_drops(time_ns)
            && self.ring.push_bytes(MessageKind::StreamEnd, bytes)
    }

    /// Gives the number of the record among those of the ring; `None`: the call was dropped.
    #[inline]
    pub(super) fn op_call(&mut self, call: &OpCallMessage<'_>) -> Option<u64> {
        if (self.waiting.is_empty() || self.settle())
            && self.tell_drops(call.start_ns)
            && call.push(&mut self.ring)
        {
            self.records += 1;
            return Some(self.records - 1);
        }
        self.ring.count_dropped(1, call.start_ns);
        None
    }

    /// Sends the value of the op call that was sent last, in pieces. Each may wait as long as a record may, and the first that finds no room
    /// ends it: false.
    pub(super) fn value(&mut self, value: &KeptValue) -> bool {
        let piece = (self.ring.capacity() / 8).min(LONGEST_PIECE);
        let (bits, bytes) = match &value.elements {
            Elements::Raw(bytes) => (false, bytes),
            Elements::Bits(bytes) => (true, bytes),
            _ => return false,
        };
        let mut offset = 0;
        loop {
            let part = bytes.get(offset..).unwrap_or_default();
            let part = part.get(..piece.min(part.len())).unwrap_or_default();
            let message = ValueMessage {
                watch: value.watch,
                dtype: value.dtype,
                bits,
                total: bytes.len() as u64,
                offset: offset as u64,
                length: part.len() as u64,
                shape: &value.shape,
                words: &[],
            };
            if !message.push(part, &mut self.ring) {
                return false;
            }
            offset += part.len();
            if offset >= bytes.len() {
                return true;
            }
        }
    }

    pub(super) fn moment(&mut self, moment: &Moment) -> Result<(), OutletError> {
        self.scratch.clear();
        codec::encode_into(moment, &mut self.scratch)?;
        if !self.settle()
            || !self.tell_drops(moment.time_ns)
            || !self.ring.push_bytes(MessageKind::Moment, &self.scratch)
        {
            self.ring.count_dropped(1, moment.time_ns);
        } else {
            self.records += 1;
        }
        Ok(())
    }

    /// Writes the waiting definitions and facts. False: no room yet.
    fn settle(&mut self) -> bool {
        while let Some((kind, bytes)) = self.waiting.front() {
            if !self.ring.push_bytes(*kind, bytes) {
                return false;
            }
            self.records += u64::from(kind.is_record());
            self.waiting_bytes -= bytes.len();
            self.waiting.pop_front();
        }
        true
    }

    /// Writes a `Drop` record for what was lost since the last one. False: no room yet.
    #[inline]
    fn tell_drops(&mut self, time_ns: u64) -> bool {
        match self.ring.untold_drops() {
            None => true,
            Some(drops) => self.tell(drops, time_ns),
        }
    }

    #[cold]
    fn tell(&mut self, (records, from_ns, until_ns): (u64, u64, u64), time_ns: u64) -> bool {
        let reason = if self.ring.consumer_silent() {
            DropReason::DaemonGone
        } else {
            DropReason::RingFull
        };
        let moment = Moment {
            time_ns,
            thread: ThreadId(0),
            event: Event::Drop {
                records,
                from_ns,
                until_ns,
                reason,
            },
        };
        let Ok(bytes) = codec::encode(&moment) else {
            return false;
        };
        if !self.ring.push_bytes(MessageKind::Moment, &bytes) {
            return false;
        }
        self.records += 1;
        self.ring.drops_told(records);
        true
    }
}

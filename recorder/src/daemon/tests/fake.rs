//! A recorded process without libtorch: what capture writes into a ring, in small.
//!
//! Also the tests of the command line use this file.

use std::path::Path;

use optape_trace::{
    Definition, Event, Moment, OpDef, OpId, Pattern, PatternId, ScopeDef, ScopeId, SignatureDef,
    SignatureId, Stage, StreamEnd, StreamInfo, ThreadDef, ThreadId, call_flags, codec,
};

use super::ring::{MessageKind, OnFull, OpCallMessage, Producer};

/// A process that records calls of one op.
pub(crate) struct Fake {
    pub(crate) ring: Producer,
    pub(crate) calls: u64,
}

impl Fake {
    /// Begins a stream with two signatures: 0, and 1, which is unattributed.
    pub(crate) fn begin(directory: &Path, ring_bytes: usize, on_full: OnFull) -> Self {
        let mut fake = Self {
            ring: Producer::create(directory, ring_bytes, on_full).expect("a ring"),
            calls: 0,
        };
        let info = StreamInfo {
            process_id: std::process::id(),
            command: vec!["fake".into()],
            ..StreamInfo::default()
        };
        fake.send(
            MessageKind::StreamBegin,
            &codec::encode(&info).expect("encodes"),
        );
        fake.define(&Definition::Op(
            OpId(0),
            OpDef {
                name: "aten::relu".into(),
                ..OpDef::default()
            },
        ));
        fake.define(&Definition::Scope(
            ScopeId(0),
            ScopeDef {
                name: "Global".into(),
                ..ScopeDef::default()
            },
        ));
        fake.define(&Definition::Thread(ThreadId(0), ThreadDef::default()));
        fake.define(&Definition::Pattern(PatternId(0), Pattern::default()));
        for (id, flags) in [(0, 0), (1, call_flags::UNATTRIBUTED)] {
            let signature = SignatureDef {
                op: OpId(0),
                arguments: Vec::new(),
                outputs: Vec::new(),
                tensors: Vec::new(),
                inputs: 0,
                flags,
                scope: ScopeId(0),
                stage: Stage::Forward,
                stage_name: None,
            };
            fake.define(&Definition::Signature(SignatureId(id), signature));
        }
        fake
    }

    pub(crate) fn define(&mut self, definition: &Definition) {
        self.send(
            MessageKind::Definition,
            &codec::encode(definition).expect("encodes"),
        );
    }

    fn send(&mut self, kind: MessageKind, bytes: &[u8]) {
        assert!(self.ring.push_bytes(kind, bytes), "no room for {kind:?}");
    }

    /// Records the next call; its number stands in its time. False: dropped, and counted.
    pub(crate) fn call(&mut self, signature: u32) -> bool {
        let call = OpCallMessage {
            signature,
            pattern: 0,
            thread: 0,
            start_ns: 1000 * self.calls,
            // Not to be compressed away.
            duration_ns: self.calls.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40,
            sequence_number: -1,
            payload: &[],
            storages: &[],
            tensors: &[],
            statistics: &[],
        };
        let taken = call.push(&mut self.ring);
        if !taken {
            self.ring.count_dropped(1, 1000 * self.calls);
        }
        self.calls += 1;
        taken
    }

    pub(crate) fn step(&mut self, step: u64) {
        let event = Event::StepMark {
            step,
            source: optape_trace::StepSource::Program,
        };
        let moment = Moment {
            time_ns: 1000 * self.calls,
            thread: ThreadId(0),
            event,
        };
        self.send(
            MessageKind::Moment,
            &codec::encode(&moment).expect("encodes"),
        );
    }

    /// Says goodbye.
    pub(crate) fn end(mut self) {
        let costs = [("capture.time_ns".to_owned(), 300 * self.calls)].into();
        let end = StreamEnd {
            records: self.calls,
            dropped_records: 0,
            ended_ns: 1000 * self.calls,
            clean: true,
            costs,
        };
        self.send(
            MessageKind::StreamEnd,
            &codec::encode(&end).expect("encodes"),
        );
    }
}

//! The stream of this process: its head, its end, and how records and definitions get into it.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::Ordering;

use optape_trace::{
    Definition, Event, LateStatistic, ModuleId, Moment, OpId, Ordinal, PatternId, Role, ScopeDef,
    ScopeId, StreamEnd, StreamInfo, TensorId, TextId, ThreadId, WatchId, codec,
};

use super::measuring::Preset;
use super::outlet::Outlet;
use super::settings::CaptureError;
use super::signatures::Signatures;
use super::{
    Failure, OWN_TIME_NS, STATISTICS_TIME_NS, STOPPED_MARKER, State, device, here, this_thread,
};
use crate::clock::{monotonic_ns, unix_ns};
use crate::ring::{MessageKind, Producer};

pub(super) struct Stream {
    pub(super) outlet: Outlet,
    pub(super) epoch_ns: u64,
    pub(super) signatures: Signatures,
    pub(super) patterns: HashMap<Vec<u64>, PatternId>,
    /// Reused.
    pub(super) metas: Vec<u64>,
    pub(super) storages: Vec<u64>,
    pub(super) tensors: Vec<u64>,
    pub(super) numbers: Vec<u64>,
    /// What ended with the call that is being written.
    pub(super) ended: Vec<Event>,
}

impl Stream {
    /// Writes statistics that came after their call, which has this number among the ring's records.
    pub(super) fn late(
        &mut self,
        time_ns: u64,
        thread: usize,
        record: u64,
        values: Vec<LateStatistic>,
    ) -> Result<(), Failure> {
        Ok(self.outlet.moment(&Moment {
            time_ns,
            thread: ThreadId(thread as u32),
            event: Event::Statistics {
                call: Ordinal(record),
                values,
            },
        })?)
    }
}

impl State {
    /// Whether there is a stream; it is begun if it was not, with its clock at 0 at `since_ns` (CLOCK_MONOTONIC). None is begun for a call that ends after the recording has.
    #[inline]
    pub(super) fn has_stream(&mut self, since_ns: u64) -> Result<bool, Failure> {
        if self.stream.is_none() {
            if !self.started || self.stopped {
                return Ok(false);
            }
            self.begin_stream(since_ns)?;
        }
        Ok(true)
    }

    #[cold]
    pub(super) fn begin_stream(&mut self, since_ns: u64) -> Result<(), Failure> {
        let settings = &self.settings;
        if settings.run_directory.join(STOPPED_MARKER).exists() {
            self.stopped = true;
            // Nothing went wrong, so nothing is said.
            return Err(Failure(String::new()));
        }
        let ring = Producer::create(
            &settings.run_directory,
            settings.ring_bytes,
            settings.on_full,
        )
        .map_err(|source| CaptureError::Ring {
            bytes: settings.ring_bytes,
            directory: settings.run_directory.clone(),
            source,
        })?;
        ring.set_epoch_ns(since_ns);
        let mut outlet = Outlet::new(ring);
        let info = StreamInfo {
            process_id: std::process::id(),
            parent_process_id: std::os::unix::process::parent_id(),
            command: settings.command.clone(),
            versions: settings.versions.clone(),
            epoch_unix_ns: unix_ns().saturating_sub(monotonic_ns().saturating_sub(since_ns)),
            identities: settings.statistics != Preset::None,
            rank: settings.rank,
            role: Role::Process,
            epoch_monotonic_ns: Some(since_ns),
        };
        if !outlet.message(MessageKind::StreamBegin, &codec::encode(&info)?) {
            return Err(Failure(
                "the ring has no room for the stream's head".to_owned(),
            ));
        }
        // What the process knows already; a forked child has it from its parent.
        for (id, text) in self.texts.all.iter().enumerate() {
            outlet.define(&Definition::Text(TextId(id as u32), text.clone()))?;
        }
        for (id, op) in self.ops.iter().enumerate() {
            outlet.define(&Definition::Op(OpId(id as u32), op.clone()))?;
        }
        for (id, module) in self.modules.iter().enumerate() {
            outlet.define(&Definition::Module(ModuleId(id as u32), module.clone()))?;
        }
        for id in 0..self.scopes.nodes.len() {
            let scope = ScopeId(id as u32);
            outlet.define(&Definition::Scope(scope, self.scope_definition(scope)))?;
        }
        for (id, thread) in self.threads.iter().enumerate() {
            outlet.define(&Definition::Thread(ThreadId(id as u32), thread.clone()))?;
        }
        for (id, watch) in self.watches.iter().enumerate() {
            outlet.define(&Definition::Watch(WatchId(id as u32), watch.clone()))?;
        }
        outlet.define(&Definition::Pattern(
            PatternId(0),
            optape_trace::Pattern::default(),
        ))?;
        let thread = this_thread();
        for ((module, key), value) in &self.facts.values {
            outlet.fact(&Moment {
                time_ns: 0,
                thread,
                event: Event::Fact {
                    module: *module,
                    key: *key,
                    value: value.clone(),
                },
            })?;
        }
        for (module, attribute, tensor) in self.facts.states() {
            outlet.moment(&Moment {
                time_ns: 0,
                thread,
                event: Event::StateAssign {
                    module,
                    attribute,
                    tensor: TensorId(tensor),
                },
            })?;
        }
        self.stream = Some(Stream {
            outlet,
            epoch_ns: since_ns,
            signatures: Signatures::new(),
            patterns: HashMap::from([(Vec::new(), PatternId(0))]),
            metas: Vec::new(),
            storages: Vec::new(),
            tensors: Vec::new(),
            numbers: Vec::new(),
            ended: Vec::new(),
        });
        self.obeyed = 0;
        self.publish_steps();
        self.scopes.nothing_told();
        match self.pause_reason() {
            Some(reason) => {
                self.publish_pause();
                self.aside(Event::Paused { reason })
            }
            None => self.tell_what_is_open(since_ns),
        }
    }

    pub(super) fn end_stream(&mut self) {
        let Some(mut stream) = self.stream.take() else {
            return;
        };
        let time_ns = monotonic_ns().saturating_sub(stream.epoch_ns);
        let thread = (this_thread().0 as usize).min(self.threads.len().saturating_sub(1));
        let (devices, times) = device::end(|record, values| {
            // Nothing more can be done where this fails.
            let _ = stream.late(time_ns, thread, record, values);
        });
        let mut costs = BTreeMap::from([
            (
                "capture.time_ns".to_owned(),
                OWN_TIME_NS.load(Ordering::Relaxed),
            ),
            (
                "capture.statistics_ns".to_owned(),
                STATISTICS_TIME_NS.load(Ordering::Relaxed),
            ),
            ("capture.calls".to_owned(), self.calls),
            ("capture.recalled_statistics".to_owned(), self.recalled),
            (
                "capture.signatures".to_owned(),
                stream.signatures.len() as u64,
            ),
            (
                "capture.lost_structures".to_owned(),
                stream.signatures.overflowed,
            ),
            ("capture.unattributed".to_owned(), self.scopes.unattributed),
            ("capture.kept_values".to_owned(), self.kept_values),
            ("capture.dropped_values".to_owned(), self.dropped_values),
            ("capture.left_out_facts".to_owned(), self.facts.left_out),
        ]);
        if devices != crate::device::Counts::default() {
            costs.extend(
                [
                    ("device.launches", devices.launches),
                    ("device.answers", devices.answers),
                    ("device.lost", devices.lost),
                    ("device.not_taken.full", devices.full),
                    ("device.not_taken.capturing", devices.capturing),
                    ("device.not_taken.refused", devices.refused),
                ]
                .map(|(name, count)| (name.to_owned(), count)),
            );
        }
        let regions = std::mem::take(&mut self.opaque_regions);
        costs.insert("capture.opaque_regions".to_owned(), regions.values().sum());
        costs.extend(
            regions
                .into_iter()
                .map(|(name, count)| (format!("opaque.{name}"), count)),
        );
        // Also where there is nothing to count: somebody has asked.
        if self.settings.times_gpus() {
            costs.extend(
                [
                    ("gpu_time.calls", times.calls),
                    ("gpu_time.read", times.read),
                    ("gpu_time.lost", times.lost),
                    ("gpu_time.not_taken.full", times.full),
                    ("gpu_time.not_taken.capturing", times.capturing),
                    ("gpu_time.not_taken.refused", times.refused),
                ]
                .map(|(name, count)| (name.to_owned(), count)),
            );
        }
        let end = StreamEnd {
            records: 0,
            dropped_records: 0,
            ended_ns: monotonic_ns().saturating_sub(stream.epoch_ns),
            clean: true,
            costs,
        };
        if let Ok(bytes) = codec::encode(&end) {
            // Where there is no room the daemon ends the stream itself.
            stream.outlet.end(end.ended_ns, &bytes);
        }
    }

    pub(super) fn define_scope(&mut self, scope: ScopeId) -> Result<(), Failure> {
        let definition = self.scope_definition(scope);
        if let Some(stream) = self.stream.as_mut() {
            stream
                .outlet
                .define(&Definition::Scope(scope, definition))?;
        }
        Ok(())
    }

    pub(super) fn scope_definition(&self, scope: ScopeId) -> ScopeDef {
        match self.scopes.nodes.get(scope.index()).copied().flatten() {
            None => ScopeDef {
                parent: None,
                name: "Global".to_owned(),
                module: None,
            },
            Some((parent, module)) => ScopeDef {
                parent: Some(parent),
                name: self
                    .modules
                    .get(module.index())
                    .map_or_else(String::new, |m| m.name.clone()),
                module: Some(module),
            },
        }
    }

    /// A record of no thread in particular.
    pub(super) fn aside(&mut self, event: Event) -> Result<(), Failure> {
        let known = here();
        let thread = match self.threads.len() {
            0 => self.thread(None)?,
            threads if known == 0 || known > threads => 0,
            _ => known - 1,
        };
        self.moment(thread, event)
    }

    /// A record that is no op call. Before the first op there is no stream, and nothing to say.
    pub(super) fn moment(&mut self, thread: usize, event: Event) -> Result<(), Failure> {
        self.moment_at(monotonic_ns(), thread, event)
    }

    pub(super) fn moment_at(
        &mut self,
        at_ns: u64,
        thread: usize,
        event: Event,
    ) -> Result<(), Failure> {
        let Some(stream) = self.stream.as_mut() else {
            return Ok(());
        };
        stream.outlet.moment(&Moment {
            time_ns: at_ns.saturating_sub(stream.epoch_ns),
            thread: ThreadId(thread as u32),
            event,
        })?;
        Ok(())
    }
}

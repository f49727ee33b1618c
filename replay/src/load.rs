//! Traces as replay sees them: one or several files of one run, each with its streams.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use optape_trace::{Dictionary, Role, ScopeId, Stream, Trace, TraceEnd};

use crate::clocks::Clocks;
use crate::error::ReplayError;
use crate::report::uuid_text;
use crate::timeline::Timeline;

/// One file.
#[derive(Debug)]
pub struct Source {
    /// As it was given.
    pub path: PathBuf,
    /// What it holds.
    pub trace: Trace,
}

/// Files that are replayed together.
#[derive(Debug)]
pub struct Traces {
    /// In the order in which they were given.
    pub sources: Vec<Source>,
    clocks: Clocks,
}

/// A stream of one of the files.
#[derive(Clone, Copy, Debug)]
pub struct StreamRef<'a> {
    /// Index into [`Traces::sources`].
    pub source: usize,
    /// The file's trace.
    pub trace: &'a Trace,
    /// The stream.
    pub stream: &'a Stream,
}

impl Traces {
    /// Opens files: the parts of one run.
    ///
    /// # Errors
    /// Where one of them is no trace that can be read, is given twice, or is of another run than the first.
    pub fn open<P: AsRef<Path>>(paths: &[P]) -> Result<Self, ReplayError> {
        let mut sources = Vec::with_capacity(paths.len());
        for path in paths {
            let path = path.as_ref().to_path_buf();
            let trace = Trace::open(&path).map_err(|source| ReplayError::Trace {
                path: path.clone(),
                source,
            })?;
            sources.push(Source { path, trace });
        }
        let traces = Self::new(sources);
        traces.check_together()?;
        Ok(traces)
    }

    fn new(sources: Vec<Source>) -> Self {
        Self {
            clocks: Clocks::of(&sources),
            sources,
        }
    }

    /// One run's parts, each once: anything else would add up what does not belong together.
    fn check_together(&self) -> Result<(), ReplayError> {
        let mut seen = HashMap::new();
        for source in &self.sources {
            // A file that is gone meanwhile is told apart by its name.
            let real = source
                .path
                .canonicalize()
                .unwrap_or_else(|_| source.path.clone());
            if let Some(first) = seen.insert(real, &source.path) {
                return Err(ReplayError::Together(format!(
                    "{} and {} are the same file: its ops would count twice",
                    first.display(),
                    source.path.display()
                )));
            }
        }
        let Some(first) = self.sources.first() else {
            return Ok(());
        };
        let uuid = |source: &Source| uuid_text(&source.trace.run().run_uuid);
        match self.sources.iter().find(|s| uuid(s) != uuid(first)) {
            None => Ok(()),
            Some(other) => Err(ReplayError::Together(format!(
                "{} and {} are of different runs ({}, {}), whose totals cannot be added up: replay them one by one; parts of \
                 one run are recorded with the same `optape record --run NAME`",
                first.path.display(),
                other.path.display(),
                uuid(first),
                uuid(other)
            ))),
        }
    }

    /// A trace that is in memory already, under a name for messages.
    #[must_use]
    pub fn of(name: &str, trace: Trace) -> Self {
        Self::new(vec![Source {
            path: PathBuf::from(name),
            trace,
        }])
    }

    /// The parts of one run that are in memory already, under names for messages.
    ///
    /// # Errors
    /// As [`Self::open`], where they do not belong together.
    pub fn of_parts(parts: Vec<(String, Trace)>) -> Result<Self, ReplayError> {
        let sources = parts.into_iter().map(|(name, trace)| Source {
            path: PathBuf::from(name),
            trace,
        });
        let traces = Self::new(sources.collect());
        traces.check_together()?;
        Ok(traces)
    }

    /// Zero of a stream's clock, nanoseconds since the Unix epoch, so that all streams line up: those of a machine by its monotonic
    /// clock, which nobody sets, machines by their wall clocks.
    #[must_use]
    pub fn epoch_unix_ns(&self, at: StreamRef<'_>) -> u64 {
        self.clocks.epoch_ns(at.source, at.stream)
    }

    /// What is known about how well the clocks line up, where there is something to say.
    #[must_use]
    pub fn clock_notes(&self) -> &[String] {
        self.clocks.notes()
    }

    /// The streams of all files that hold a recorded process.
    pub fn streams(&self) -> impl Iterator<Item = StreamRef<'_>> {
        self.with_role(Role::Process)
    }

    /// The streams of all files that hold what monitors sampled.
    pub fn monitors(&self) -> impl Iterator<Item = StreamRef<'_>> {
        self.with_role(Role::Monitor)
    }

    fn with_role(&self, role: Role) -> impl Iterator<Item = StreamRef<'_>> {
        self.sources
            .iter()
            .enumerate()
            .flat_map(move |(source, s)| {
                let streams = s.trace.streams().iter();
                streams
                    .filter(move |stream| stream.info().role == role)
                    .map(move |stream| StreamRef {
                        source,
                        trace: &s.trace,
                        stream,
                    })
            })
    }

    pub(crate) fn error(&self, source: usize, error: optape_trace::TraceError) -> ReplayError {
        let path = self
            .sources
            .get(source)
            .map(|s| s.path.clone())
            .unwrap_or_default();
        ReplayError::Trace {
            path,
            source: error,
        }
    }

    /// The timelines of all streams, in the order of [`Self::streams`].
    pub(crate) fn timelines(
        &self,
        needed: bool,
        ranges: &[String],
    ) -> Result<Vec<Timeline>, ReplayError> {
        self.streams()
            .map(|at| Timeline::read(at, needed, ranges).map_err(|e| self.error(at.source, e)))
            .collect()
    }

    /// What a reader has to know about how complete the files are: truncation, damage, drops, a recorder that gave up.
    pub(crate) fn incompleteness(&self, timelines: &[Timeline]) -> Vec<String> {
        let mut notes = Vec::new();
        for source in &self.sources {
            let path = source.path.display();
            match source.trace.end() {
                TraceEnd::Clean(_) => {}
                TraceEnd::Unfinished { valid_bytes, file_bytes } => notes.push(format!(
                    "{path}: the recording is unfinished or was cut; {valid_bytes} of {file_bytes} bytes are readable"
                )),
                TraceEnd::Damaged { offset, what, .. } => notes.push(format!(
                    "{path}: damaged at byte {offset} ({what}); what stands before it is counted, `optape recover` may save more"
                )),
            }
            for stream in source.trace.monitors() {
                if stream.dropped_records() > 0 {
                    notes.push(format!(
                        "{path}: {} samples of monitors were lost while recording",
                        stream.dropped_records()
                    ));
                }
            }
            for stream in source.trace.processes() {
                if stream.dropped_records() > 0 {
                    notes.push(format!(
                        "{path}: process {} lost {} records while recording; they are in no count",
                        stream.info().process_id,
                        stream.dropped_records()
                    ));
                }
            }
        }
        for (number, at) in self.streams().enumerate() {
            let timeline = timelines.get(number);
            let costs = at.stream.end().map(|end| &end.costs);
            let told = |key| costs.and_then(|costs| costs.get(key)).copied();
            // A stream without an end does not sum up: what the timeline saw has to do.
            if let Some(pauses) =
                told("recording.pauses").or(timeline.map(|t| t.pauses).filter(|n| *n > 0))
            {
                let length = told("recording.paused_ns").map_or_else(String::new, |ns| {
                    #[expect(clippy::cast_precision_loss, reason = "rounded for people")]
                    let seconds = ns as f64 / 1e9;
                    format!(", for {seconds:.1} s in all")
                });
                notes.push(format!(
                    "process {}: recording was paused {pauses} time(s){length}; what ran then is in no count",
                    at.stream.info().process_id
                ));
            }
            for reason in timeline.iter().flat_map(|t| &t.disabled) {
                notes.push(format!(
                    "process {}: the recorder switched itself off, what ran afterwards is in no count: {reason}",
                    at.stream.info().process_id
                ));
            }
        }
        notes
    }
}

/// An interned text; what is not defined shows as such.
pub(crate) fn text(dictionary: &Dictionary, id: optape_trace::TextId) -> String {
    dictionary
        .text(id)
        .cloned()
        .unwrap_or_else(|| format!("<text {id}>"))
}

/// Names and classes of the modules on a call's stack, innermost first, `Global` last.
pub(crate) fn stack(dictionary: &Dictionary, scope: ScopeId) -> Vec<(String, Vec<String>)> {
    let mut stack = Vec::new();
    let mut at = Some(scope);
    // A scope is defined after its parent, so ids fall; anything else is not followed.
    while let Some(id) = at {
        let Some(scope) = dictionary.scope(id) else {
            break;
        };
        let classes = scope
            .module
            .and_then(|m| dictionary.module(m))
            .map(|m| m.classes.clone())
            .unwrap_or_default();
        stack.push((scope.name.clone(), classes));
        at = scope.parent.filter(|parent| *parent < id);
    }
    if !stack.iter().any(|(name, _)| name == "Global") {
        stack.push(("Global".to_owned(), Vec::new()));
    }
    stack
}

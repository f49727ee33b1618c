//! `optape info TRACE...`: what a trace is, without counting anything.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, ValueEnum, ValueHint};
use optape_replay::Traces;
use optape_replay::report::{grouped, scaled, uuid_text};
use optape_trace::series::facts;
use optape_trace::{Event, Stream, Trace, TraceEnd};
use serde_json::{Value, json};

use crate::options::GlobalOptions;
use crate::output::OutputOptions;

/// Options of `optape info`.
#[derive(Debug, Args)]
pub struct Options {
    /// Trace files
    #[arg(required = true, value_name = "TRACE", value_hint = ValueHint::FilePath)]
    pub traces: Vec<PathBuf>,
    /// What every counter and model of replay would need beyond what the file holds, and the flag of `optape record` that records it
    #[arg(long)]
    pub needs: bool,
    /// How to write it
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    pub format: InfoFormat,
    /// Where to.
    #[command(flatten)]
    pub output: OutputOptions,
}

/// Values of `--format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum InfoFormat {
    /// For people
    Table,
    /// For programs
    Json,
}

/// Prints what the files say of themselves.
///
/// # Errors
/// Where one of them is no trace, or the text cannot be written.
pub fn run(options: &Options, _global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    let mut text = Vec::new();
    let mut objects = Vec::new();
    for path in &options.traces {
        let traces = Traces::open(&[path])?;
        let Some(trace) = traces.sources.first().map(|source| &source.trace) else {
            continue;
        };
        let needs = options
            .needs
            .then(|| optape_replay::needs(&traces))
            .transpose()?;
        let path = path.display().to_string();
        let bytes = trace.file_bytes().with_context(|| path.clone())?;
        match options.format {
            InfoFormat::Table => {
                table(&path, trace, bytes, &mut text).with_context(|| path.clone())?;
                for note in traces.clock_notes() {
                    writeln!(text, "  {:<12} {note}", "clock")?;
                }
                if let Some(needs) = &needs {
                    needs.write_text(&mut text)?;
                }
            }
            InfoFormat::Json => {
                let mut object = object(&path, trace, bytes).with_context(|| path.clone())?;
                if let Value::Object(object) = &mut object {
                    object.insert("clock".to_owned(), json!(traces.clock_notes()));
                    if let Some(needs) = &needs {
                        object.insert("needs".to_owned(), serde_json::to_value(needs)?);
                    }
                }
                objects.push(object);
            }
        }
    }
    if options.format == InfoFormat::Json {
        serde_json::to_writer_pretty(&mut text, &objects)?;
        text.push(b'\n');
    }
    options.output.write_all(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// From the first to the last record.
fn span_ns(stream: &Stream) -> u64 {
    let first = stream
        .blocks()
        .iter()
        .map(|b| b.first_ns)
        .min()
        .unwrap_or(0);
    let last = stream.blocks().iter().map(|b| b.last_ns).max().unwrap_or(0);
    last.saturating_sub(first)
}

/// That the stream is not the whole run.
fn pauses(costs: &std::collections::BTreeMap<String, u64>) -> Option<String> {
    let pauses = *costs.get("recording.pauses")?;
    let times = match pauses {
        1 => "once".to_owned(),
        n => format!("{} times", grouped(i128::from(n))),
    };
    #[expect(clippy::cast_precision_loss, reason = "rounded for people")]
    let seconds = costs.get("recording.paused_ns").copied().unwrap_or(0) as f64 / 1e9;
    Some(format!(
        "{times}, {} in all: totals are not those of the whole run",
        scaled(seconds, "s")
    ))
}

/// Of a stream without an end: whether its last word is that it is paused.
fn paused_now(trace: &Trace, stream: &Stream) -> Option<String> {
    let last = trace
        .moments(stream.id())
        .ok()?
        .into_iter()
        .rev()
        .find_map(|(_, moment)| match moment.event {
            Event::Paused { reason } => Some(Some(reason)),
            Event::Resumed => Some(None),
            _ => None,
        })??;
    Some(format!("at present ({})", last.name()))
}

fn ratio(bytes: u64, op_calls: u64) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
    let ratio = bytes as f64 / op_calls as f64;
    (op_calls > 0).then_some(ratio)
}

fn end_text(end: &TraceEnd) -> String {
    match end {
        TraceEnd::Clean(end) => match (end.exit_code, end.signal) {
            (Some(code), _) => format!("finished; the command exited with {code}"),
            (None, Some(signal)) => format!("finished; the command was ended by signal {signal}"),
            (None, None) => "finished".to_owned(),
        },
        TraceEnd::Unfinished {
            valid_bytes,
            file_bytes,
        } => {
            format!(
                "unfinished: {valid_bytes} of {file_bytes} bytes are whole; `optape recover` makes a finished copy"
            )
        }
        TraceEnd::Damaged { offset, what, .. } => {
            format!("damaged at byte {offset}: {what}; `optape recover` saves what is whole")
        }
    }
}

fn table(path: &str, trace: &Trace, bytes: u64, out: &mut Vec<u8>) -> anyhow::Result<()> {
    let run = trace.run();
    let (major, minor) = trace.format_version();
    let op_calls: u64 = trace.streams().iter().map(Stream::op_calls).sum();
    writeln!(out, "{path}")?;
    let mut line = |name: &str, value: String| writeln!(out, "  {name:<12} {value}");
    line("run", uuid_text(&run.run_uuid))?;
    line("command", run.command.join(" "))?;
    line("directory", run.working_directory.clone())?;
    line("host", run.host.clone())?;
    line("started", format!("{} ns since 1970", run.started_unix_ns))?;
    line(
        "recorded by",
        format!("optape {}, format {major}.{minor}", run.optape_version),
    )?;
    line(
        "statistics",
        format!("{} (needs table {})", run.statistics, run.needs_version),
    )?;
    line("end", end_text(trace.end()))?;
    let per_op = ratio(bytes, op_calls)
        .map(|r| format!(", {r:.2} bytes per op call"))
        .unwrap_or_default();
    line(
        "size",
        format!("{} bytes{per_op}", grouped(i128::from(bytes))),
    )?;
    for (key, value) in &run.facts {
        line("fact", format!("{key} = {value}"))?;
    }
    for stream in trace.processes() {
        let info = stream.info();
        let rank = info.rank.map(|r| format!(", rank {r}")).unwrap_or_default();
        writeln!(
            out,
            "  process {} (number {}{rank}): {}",
            info.process_id,
            stream.id(),
            info.command.join(" ")
        )?;
        let versions: Vec<String> = info
            .versions
            .iter()
            .map(|(name, version)| format!("{name} {version}"))
            .collect();
        #[expect(clippy::cast_precision_loss, reason = "rounded for people")]
        let seconds = span_ns(stream) as f64 / 1e9;
        let dictionary = stream.dictionary();
        let mut line = |name: &str, value: String| writeln!(out, "    {name:<10} {value}");
        line("versions", versions.join(", "))?;
        line("records", grouped(i128::from(stream.records())))?;
        line("op calls", grouped(i128::from(stream.op_calls())))?;
        if let Some(calls) = function_calls(trace, stream).filter(|calls| *calls > 0) {
            line(
                "functions",
                format!(
                    "{} of the calls are of functions",
                    grouped(i128::from(calls))
                ),
            )?;
        }
        line("time", scaled(seconds, "s"))?;
        if let Some(text) = gpu_time(trace, stream) {
            line("GPU time", text)?;
        }
        if let Some(text) = opaque(trace, stream) {
            line("opaque", text)?;
        }
        line("ops", dictionary.ops().len().to_string())?;
        line("signatures", dictionary.signatures().len().to_string())?;
        line("modules", dictionary.modules().len().to_string())?;
        line("threads", dictionary.threads().len().to_string())?;
        line("blocks", stream.blocks().len().to_string())?;
        if stream.dropped_records() > 0 {
            line(
                "lost",
                format!("{} records", grouped(i128::from(stream.dropped_records()))),
            )?;
        }
        match stream.end() {
            Some(end) => {
                line(
                    "end",
                    if end.clean {
                        "clean".to_owned()
                    } else {
                        "the process did not say goodbye".to_owned()
                    },
                )?;
                if let Some(text) = pauses(&end.costs) {
                    line("paused", text)?;
                }
                for (key, value) in &end.costs {
                    line("cost", format!("{key} = {value}"))?;
                }
            }
            None => {
                line("end", "open".to_owned())?;
                if let Some(reason) = paused_now(trace, stream) {
                    line("paused", reason)?;
                }
            }
        }
    }
    for stream in trace.monitors() {
        monitors(trace, stream, out)?;
    }
    Ok(())
}

/// How long the work of the calls took on GPUs, where somebody asked.
fn gpu_time(trace: &Trace, stream: &Stream) -> Option<String> {
    let asked = trace.run().facts.contains_key("capture.gpu_time");
    let time = optape_replay::device_time(trace, stream).ok()?;
    if time.is_empty() {
        return asked.then(|| "none: no op had work for a GPU".to_owned());
    }
    let calls = |n: u64| grouped(i128::from(n));
    let missing = match time.missing_calls {
        0 => String::new(),
        n => format!("; times of {} more are missing", calls(n)),
    };
    #[expect(clippy::cast_precision_loss, reason = "rounded for people")]
    let seconds = time.time_ns as f64 / 1e9;
    Some(format!(
        "{} in {} op calls{missing}",
        scaled(seconds, "s"),
        calls(time.calls)
    ))
}

/// What ran outside of the dispatcher, by name.
fn opaque(trace: &Trace, stream: &Stream) -> Option<String> {
    const MOST_NAMES: usize = 8;
    let regions = optape_replay::opaque_regions(trace, stream).ok()??;
    let total: u64 = regions.values().sum();
    if total == 0 {
        return None;
    }
    let mut names: Vec<(&String, &u64)> = regions.iter().collect();
    names.sort_by(|a, b| b.1.cmp(a.1).then_with(|| a.0.cmp(b.0)));
    let more = names.len().saturating_sub(MOST_NAMES);
    names.truncate(MOST_NAMES);
    let mut parts: Vec<String> = names
        .iter()
        .map(|(name, count)| format!("{name} ({})", grouped(i128::from(**count))))
        .collect();
    if more > 0 {
        parts.push(format!("and {more} more names"));
    }
    Some(format!(
        "{} regions outside of the dispatcher: {}",
        grouped(i128::from(total)),
        parts.join(", ")
    ))
}

/// Facts, and series with their counts.
fn monitors(trace: &Trace, stream: &Stream, out: &mut Vec<u8>) -> anyhow::Result<()> {
    writeln!(
        out,
        "  monitors (number {}): {} records{}",
        stream.id(),
        grouped(i128::from(stream.records())),
        match stream.dropped_records() {
            0 => String::new(),
            lost => format!(", {} lost", grouped(i128::from(lost))),
        }
    )?;
    for (key, value) in optape_replay::facts(trace, stream)? {
        let text = match (key.strip_prefix(facts::SOURCE_PREFIX), &value) {
            (Some(_), Value::Object(state)) => {
                let word = |name: &str| state.get(name).and_then(Value::as_str);
                let hint = word("hint")
                    .map(|hint| format!("; {hint}"))
                    .unwrap_or_default();
                let absent = if word("state") == Some("absent") {
                    "absent: "
                } else {
                    ""
                };
                format!("{absent}{}{hint}", word("what").unwrap_or_default())
            }
            (_, Value::String(text)) => text.clone(),
            (_, value) => value.to_string(),
        };
        writeln!(out, "    {key:<10} {text}")?;
    }
    for (name, samples) in optape_replay::sample_counts(trace, stream)? {
        let samples = grouped(i128::from(samples));
        writeln!(out, "    series     {name}: {samples} samples")?;
    }
    if let Some(end) = stream.end() {
        for (key, value) in &end.costs {
            writeln!(out, "    cost       {key} = {value}")?;
        }
    }
    Ok(())
}

/// How many of a stream's op calls are calls of Python functions (`--functions`); `None` where the file is too damaged to say.
fn function_calls(trace: &Trace, stream: &Stream) -> Option<u64> {
    let dictionary = stream.dictionary();
    if !dictionary.ops().any(|(_, op)| op.function().is_some()) {
        return Some(0);
    }
    let rows = trace.summary(stream.id(), 0..stream.records()).ok()?;
    let calls = rows.iter().filter(|row| {
        let signature = dictionary.signature(row.signature);
        signature
            .and_then(|s| dictionary.op(s.op))
            .is_some_and(|op| op.function().is_some())
    });
    Some(calls.map(|row| row.calls).sum())
}

fn object(path: &str, trace: &Trace, bytes: u64) -> anyhow::Result<Value> {
    let run = trace.run();
    let (major, minor) = trace.format_version();
    let streams: Vec<Value> = trace
        .processes()
        .map(|stream| {
            let info = stream.info();
            let dictionary = stream.dictionary();
            json!({
                "id": stream.id().0,
                "process_id": info.process_id,
                "parent_process_id": info.parent_process_id,
                "rank": info.rank,
                "command": info.command,
                "versions": info.versions,
                "identities": info.identities,
                "epoch_unix_ns": info.epoch_unix_ns,
                "epoch_monotonic_ns": info.epoch_monotonic_ns,
                "records": stream.records(),
                "op_calls": stream.op_calls(),
                "function_calls": function_calls(trace, stream),
                "dropped_records": stream.dropped_records(),
                "time_ns": span_ns(stream),
                "gpu_time": optape_replay::device_time(trace, stream).ok().filter(|time| !time.is_empty()),
                "opaque_regions": optape_replay::opaque_regions(trace, stream).ok().flatten(),
                "ops": dictionary.ops().len(),
                "signatures": dictionary.signatures().len(),
                "modules": dictionary.modules().len(),
                "threads": dictionary.threads().len(),
                "blocks": stream.blocks().len(),
                "clean": stream.end().map(|end| end.clean),
                "costs": stream.end().map(|end| &end.costs),
            })
        })
        .collect();
    let op_calls: u64 = trace.streams().iter().map(Stream::op_calls).sum();
    let mut monitors = Vec::new();
    for stream in trace.monitors() {
        let series = optape_replay::sample_counts(trace, stream)?;
        let series: serde_json::Map<String, Value> = series
            .into_iter()
            .map(|(name, samples)| (name, samples.into()))
            .collect();
        monitors.push(json!({
            "id": stream.id().0,
            "records": stream.records(),
            "dropped_records": stream.dropped_records(),
            "time_ns": span_ns(stream),
            "facts": optape_replay::facts(trace, stream)?,
            "series": series,
            "costs": stream.end().map(|end| &end.costs),
        }));
    }
    Ok(json!({
        "path": path,
        "run_uuid": uuid_text(&run.run_uuid),
        "command": run.command,
        "working_directory": run.working_directory,
        "host": run.host,
        "started_unix_ns": run.started_unix_ns,
        "recorded_by": run.optape_version,
        "format": format!("{major}.{minor}"),
        "statistics": run.statistics,
        "needs_version": run.needs_version,
        "facts": run.facts,
        "end": match trace.end() {
            TraceEnd::Clean(end) => json!({"state": "clean", "exit_code": end.exit_code, "signal": end.signal, "ended_unix_ns": end.ended_unix_ns}),
            TraceEnd::Unfinished { valid_bytes, .. } => json!({"state": "unfinished", "valid_bytes": valid_bytes}),
            TraceEnd::Damaged { offset, what, .. } => json!({"state": "damaged", "offset": offset, "what": what}),
        },
        "file_bytes": bytes,
        "op_calls": op_calls,
        "bytes_per_op_call": ratio(bytes, op_calls),
        "streams": streams,
        "monitors": monitors,
    }))
}

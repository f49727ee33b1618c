//! Where a trace comes from: what is known about the run before it starts.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use optape_trace::needs::NEEDS_VERSION;
use optape_trace::{RunInfo, facts as facts_keys};

use super::{Selection, Settings};
use crate::clock::{unix_ns, wall_clock_error_ns};
use crate::ring::OnFull;

/// Environment variables that change what a training run computes or how fast. Nothing else is kept: environments hold secrets.
const VARIABLES: [&str; 16] = [
    "CONDA_DEFAULT_ENV",
    "CONDA_PREFIX",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "LOCAL_RANK",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "PYTHONHASHSEED",
    "PYTHONPATH",
    "RANK",
    "SLURM_JOB_ID",
    "VIRTUAL_ENV",
    "WORLD_SIZE",
];
const VARIABLE_PREFIXES: [&str; 5] = ["OPTAPE_", "PYTORCH_", "TORCH_", "TORCHINDUCTOR_", "KMP_"];
/// `git` on a slow file system must not hold up the start for longer.
const GIT_PATIENCE: Duration = Duration::from_secs(2);

/// The run's description.
pub(super) fn run_info(command: &[OsString], settings: &Settings) -> RunInfo {
    let mut facts = BTreeMap::new();
    environment(std::env::vars_os(), &mut facts);
    host(&mut facts);
    let directory = std::env::current_dir().unwrap_or_default();
    git(&directory, &mut facts);
    facts.insert("capture.ring_bytes".into(), settings.ring_bytes.to_string());
    facts.insert(
        "capture.on_full".into(),
        if settings.on_full == OnFull::Drop {
            "drop"
        } else {
            "wait"
        }
        .into(),
    );
    facts.insert(
        "capture.force_torch".into(),
        settings.force_torch.to_string(),
    );
    facts.insert(
        "capture.level".into(),
        settings.detail.level.name().to_owned(),
    );
    if !settings.detail.states.is_empty() {
        facts.insert("capture.states".into(), listed(&settings.detail.states));
    }
    if !settings.detail.watches.is_empty() {
        facts.insert("capture.watches".into(), listed(&settings.detail.watches));
        let gradients = settings
            .detail
            .watches
            .iter()
            .any(|w| w.names.iter().any(|n| n == "grad_input"));
        if gradients {
            facts.insert(
                "capture.grad_input".into(),
                "from the autograd nodes of each call".into(),
            );
        }
    }
    facts.insert(
        "capture.keep".into(),
        settings.detail.keep.name().to_owned(),
    );
    if let Some(name) = &settings.run {
        facts.insert("run.name".into(), name.clone());
    }
    facts.insert("capture.functions".into(), settings.functions.to_string());
    if settings.eager {
        facts.insert("capture.eager".into(), "true".into());
    }
    if settings.gpu_time {
        facts.insert("capture.gpu_time".into(), "true".into());
    }
    if let Some(schedule) = settings.schedule {
        facts.insert("capture.schedule".into(), schedule.to_string());
    }
    if let Some(length) = settings.window {
        facts.insert("capture.window_s".into(), length.as_secs().to_string());
    }
    if settings.paused {
        facts.insert("capture.paused".into(), "true".into());
    }
    RunInfo {
        run_uuid: run_uuid(settings.run.as_deref()).into_bytes(),
        optape_version: env!("CARGO_PKG_VERSION").to_owned(),
        command: command
            .iter()
            .map(|word| word.to_string_lossy().into_owned())
            .collect(),
        working_directory: directory.to_string_lossy().into_owned(),
        host: read("/proc/sys/kernel/hostname").unwrap_or_default(),
        started_unix_ns: unix_ns(),
        statistics: settings.statistics_name().to_owned(),
        needs_version: NEEDS_VERSION,
        facts,
    }
}

fn listed(selections: &[Selection]) -> String {
    let all = selections
        .iter()
        .map(|s| format!("{}:{}", s.pattern, s.names.join(",")));
    all.collect::<Vec<_>>().join(" ")
}

/// The same for every part of a run that goes by the same name; without a name a new one.
fn run_uuid(name: Option<&str>) -> uuid::Uuid {
    name.map_or_else(uuid::Uuid::new_v4, |name| {
        uuid::Uuid::parse_str(name).unwrap_or_else(|_| {
            uuid::Uuid::new_v5(
                &uuid::Uuid::NAMESPACE_OID,
                format!("optape run {name}").as_bytes(),
            )
        })
    })
}

fn environment(
    variables: impl Iterator<Item = (OsString, OsString)>,
    facts: &mut BTreeMap<String, String>,
) {
    for (name, value) in variables {
        let Some(name) = name.to_str() else { continue };
        if VARIABLES.contains(&name)
            || VARIABLE_PREFIXES
                .iter()
                .any(|prefix| name.starts_with(prefix))
        {
            facts.insert(format!("env.{name}"), value.to_string_lossy().into_owned());
        }
    }
}

fn host(facts: &mut BTreeMap<String, String>) {
    let mut fact = |key: &str, value: Option<String>| {
        if let Some(value) = value.filter(|v| !v.is_empty()) {
            facts.insert(key.to_owned(), value);
        }
    };
    fact(facts_keys::BOOT_ID, read("/proc/sys/kernel/random/boot_id"));
    fact(
        facts_keys::CLOCK_ERROR,
        wall_clock_error_ns().map(|ns| ns.to_string()),
    );
    fact("host.kernel", read("/proc/sys/kernel/osrelease"));
    fact("host.architecture", Some(std::env::consts::ARCH.to_owned()));
    fact(
        "host.cpu",
        read("/proc/cpuinfo").and_then(|text| value_of(&text, "model name")),
    );
    fact(
        "host.cpus",
        std::thread::available_parallelism()
            .ok()
            .map(|n| n.to_string()),
    );
    let kilobytes = read("/proc/meminfo").and_then(|text| {
        value_of(&text, "MemTotal")?
            .strip_suffix("kB")?
            .trim()
            .parse::<u64>()
            .ok()
    });
    fact(
        "host.memory_bytes",
        kilobytes.map(|kb| (kb * 1024).to_string()),
    );
    fact(
        "host.os",
        read("/etc/os-release").and_then(|text| os_name(&text)),
    );
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path)
        .ok()
        .map(|text| text.trim().to_owned())
}

fn value_of(text: &str, key: &str) -> Option<String> {
    text.lines().find_map(|line| {
        Some(
            line.strip_prefix(key)?
                .trim_start()
                .strip_prefix(':')?
                .trim()
                .to_owned(),
        )
    })
}

fn os_name(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        Some(
            line.strip_prefix("PRETTY_NAME=")?
                .trim_matches('"')
                .to_owned(),
        )
    })
}

fn git(directory: &Path, facts: &mut BTreeMap<String, String>) {
    let deadline = Instant::now() + GIT_PATIENCE;
    let ask = |arguments: &[&str]| {
        let mut command = Command::new("git");
        // Without the lock, `status` leaves the index file alone.
        command
            .current_dir(directory)
            .args(arguments)
            .env("GIT_OPTIONAL_LOCKS", "0");
        output_before(command, deadline)
    };
    let Some(commit) = ask(&["rev-parse", "HEAD"]) else {
        return;
    };
    facts.insert("git.commit".into(), commit.trim().to_owned());
    if let Some(changes) = ask(&["status", "--porcelain", "--untracked-files=no"]) {
        facts.insert("git.dirty".into(), (!changes.trim().is_empty()).to_string());
    }
}

/// What a command prints, if it succeeds in time.
pub(super) fn output_before(mut command: Command, deadline: Instant) -> Option<String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let stdout = child.stdout.take()?;
    let (sent, received) = crossbeam::channel::bounded(1);
    std::thread::spawn(move || {
        let mut text = String::new();
        let _ = sent.send(stdout.take(1 << 20).read_to_string(&mut text).map(|_| text));
    });
    let status = loop {
        match child.try_wait().ok()? {
            Some(status) => break status,
            None if Instant::now() > deadline => {
                let _ = child.kill();
                let _ = child.wait();
                return None;
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    // Not `join`: a grandchild may hold the pipe open.
    let text = received
        .recv_timeout(Duration::from_millis(200))
        .ok()?
        .ok()?;
    status.success().then_some(text)
}

/// The name that a trace gets where the user gave none: `optape-PROGRAM-PID.optape`.
pub(super) fn default_file_name(program: &OsStr) -> String {
    let program = Path::new(program)
        .file_name()
        .map_or_else(|| "program".into(), OsStr::to_string_lossy);
    format!("optape-{program}-{}.optape", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_stay_out() {
        let mut facts = BTreeMap::new();
        let variables = [
            ("AWS_SECRET_ACCESS_KEY", "x"),
            ("OMP_NUM_THREADS", "2"),
            ("PYTORCH_CUDA_ALLOC_CONF", "y"),
            ("WANDB_API_KEY", "z"),
        ];
        environment(
            variables.into_iter().map(|(k, v)| (k.into(), v.into())),
            &mut facts,
        );
        assert_eq!(
            facts.keys().collect::<Vec<_>>(),
            ["env.OMP_NUM_THREADS", "env.PYTORCH_CUDA_ALLOC_CONF"]
        );
    }

    #[test]
    fn a_repository_is_described() {
        let directory = tempfile::tempdir().unwrap();
        let run = |arguments: &[&str]| {
            let identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"];
            let status = Command::new("git")
                .current_dir(directory.path())
                .args(identity)
                .args(arguments)
                .stdout(Stdio::null())
                .status();
            assert!(status.unwrap().success());
        };
        let mut facts = BTreeMap::new();
        git(directory.path(), &mut facts);
        assert!(facts.is_empty(), "{facts:?}");
        run(&["init", "-q"]);
        std::fs::write(directory.path().join("train.py"), "1").unwrap();
        run(&["add", "."]);
        run(&["commit", "-q", "-m", "first"]);
        git(directory.path(), &mut facts);
        assert_eq!(facts["git.commit"].len(), 40);
        assert_eq!(facts["git.dirty"], "false");
        std::fs::write(directory.path().join("train.py"), "2").unwrap();
        git(directory.path(), &mut facts);
        assert_eq!(facts["git.dirty"], "true");
    }

    #[test]
    fn a_command_that_hangs_is_given_up() {
        let mut sleep = Command::new("sleep");
        sleep.arg("60");
        let began = Instant::now();
        assert_eq!(
            output_before(sleep, Instant::now() + Duration::from_millis(50)),
            None
        );
        assert!(began.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn the_host_is_described() {
        let mut facts = BTreeMap::new();
        host(&mut facts);
        assert!(facts["host.memory_bytes"].parse::<u64>().unwrap() > 1 << 20);
        assert!(facts.contains_key("host.kernel") && facts.contains_key("host.cpus"));
    }

    #[test]
    fn names_of_files() {
        let name = default_file_name(OsStr::new("/usr/bin/python3"));
        assert_eq!(
            name,
            format!("optape-python3-{}.optape", std::process::id())
        );
    }
}

//! `optape config [SUBCOMMAND]`: what is in force, and where it comes from.

use std::io::Write;
use std::process::ExitCode;

use clap::{Arg, ArgAction, Args, Command, CommandFactory};
use optape_replay::ReplayError;
use toml::Value;

use crate::layers::{Layers, flags, is_falsey};
use crate::options::GlobalOptions;
use crate::output::OutputOptions;

/// Options of `optape config`.
#[derive(Debug, Args)]
#[command(after_help = "\
Lowest to highest: what is built in, $XDG_CONFIG_HOME/optape/config.toml, optape.toml of the project (the current directory, or one \
above it in the same repository), the file of --config, the environment, flags.\n\n\
Keys are long flags, in a table per subcommand; those of all subcommands stand at the top. The variable of a flag is \
OPTAPE_SUBCOMMAND_FLAG, for example OPTAPE_REPLAY_RULES. What is switched on by a file or a variable is switched off by --no-FLAG. \
Paths in a file are relative to the file.")]
pub struct Options {
    /// The flags of one subcommand
    #[arg(value_name = "SUBCOMMAND")]
    pub subcommand: Option<String>,
    /// Only what is not built in
    #[arg(long)]
    pub changed: bool,
    /// Where to.
    #[command(flatten)]
    pub output: OutputOptions,
}

/// Prints every flag with its value, as a file that could be read again.
///
/// # Errors
/// Where a layer is wrong, there is no such subcommand, or the output cannot be written.
pub fn run(options: &Options, global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    let command = crate::options::Options::command();
    let layers = Layers::read(&command, global.config.as_deref())?;
    let mut page = Page {
        layers: &layers,
        changed: options.changed,
        text: Vec::new(),
    };
    for (path, there) in &layers.files {
        let note = if *there { "" } else { " (not there)" };
        writeln!(page.text, "# file: {}{note}", path.display())?;
    }
    match &options.subcommand {
        Some(name) => {
            let found = command.find_subcommand(name).ok_or_else(|| {
                let known = command.get_subcommands().map(Command::get_name);
                ReplayError::unknown_name("subcommand", name, known)
            })?;
            page.table(found, &mut vec![name.clone()])?;
        }
        None => page.table(&command, &mut Vec::new())?,
    }
    options.output.write_all(&page.text)?;
    Ok(ExitCode::SUCCESS)
}

struct Page<'a> {
    layers: &'a Layers,
    changed: bool,
    text: Vec<u8>,
}

impl Page<'_> {
    fn table(&mut self, command: &Command, path: &mut Vec<String>) -> std::io::Result<()> {
        let lines: Vec<String> = flags(command)
            .filter_map(|flag| self.line(flag, path))
            .collect();
        if !lines.is_empty() {
            writeln!(self.text)?;
            if !path.is_empty() {
                writeln!(self.text, "[{}]", path.join("."))?;
            }
        }
        for line in lines {
            writeln!(self.text, "{line}")?;
        }
        for inner in command.get_subcommands() {
            path.push(inner.get_name().to_owned());
            self.table(inner, path)?;
            path.pop();
        }
        Ok(())
    }

    /// What nobody set, and what is built in but gives way to what somebody set, stands as a comment.
    fn line(&self, flag: &Arg, path: &[String]) -> Option<String> {
        let long = flag.get_long()?;
        if let Some(setting) = self.layers.get(path, long) {
            let values = shown(flag, &setting.values);
            return Some(format!("{long} = {values}  # {}", setting.origin));
        }
        if self.changed {
            return None;
        }
        let built_in: Vec<String> = flag
            .get_default_values()
            .iter()
            .map(|value| value.to_string_lossy().into_owned())
            .collect();
        let instead = self.layers.in_place_of(path, long);
        Some(match (flag.get_action(), instead) {
            (ArgAction::SetTrue, _) => format!("{long} = false  # built in"),
            (ArgAction::Count, _) => format!("{long} = 0  # built in"),
            _ if built_in.is_empty() => format!("# {long} is not set"),
            (_, Some(instead)) => format!("# {long} gives way to {instead}"),
            (_, None) => format!("{long} = {}  # built in", shown(flag, &built_in)),
        })
    }
}

fn shown(flag: &Arg, values: &[String]) -> String {
    let value = |text: &String| match flag.get_action() {
        ArgAction::SetTrue => Value::Boolean(!is_falsey(text)),
        ArgAction::Count => text
            .parse()
            .map_or(Value::String(text.clone()), Value::Integer),
        _ => Value::String(text.clone()),
    };
    match (flag.get_action(), values) {
        (ArgAction::Append, values) => {
            let items: Vec<String> = values.iter().map(|text| value(text).to_string()).collect();
            format!("[{}]", items.join(", "))
        }
        (_, [one]) => value(one).to_string(),
        (_, values) => values.join(" "),
    }
}

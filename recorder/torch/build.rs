//! Builds the hook (`../hook/optape_hook.cpp`) against the libtorch that torch-sys found, and sees to it that the
//! tests and examples of this package find that libtorch when they run.
//!
//! torch-sys hands its library directory to packages that depend on it directly (`DEP_TCH_LIBTORCH_LIB`); headers and
//! compiler flags are found from there, so that there is one search for libtorch and not two that may differ.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let hook = PathBuf::from(variable("CARGO_MANIFEST_DIR")?).join("../hook");
    let (source, header) = (hook.join("optape_hook.cpp"), hook.join("optape_hook.h"));
    for path in [&source, &header] {
        println!("cargo:rerun-if-changed={}", path.display());
    }

    let libraries = PathBuf::from(variable("DEP_TCH_LIBTORCH_LIB")?);
    let includes = include_directories(&libraries)?;

    cc::Build::new()
        .cpp(true)
        .pic(true)
        .std("c++20")
        // Whatever cargo's profile is: the hook runs at every op, and libtorch itself was built with NDEBUG.
        .opt_level(2)
        .define("NDEBUG", None)
        .define("_GLIBCXX_USE_CXX11_ABI", cxx11_abi().as_str())
        .includes(&includes)
        .include(&hook)
        // The headers of libtorch are full of them.
        .warnings(false)
        .file(&source)
        .try_compile("optape_hook")?;

    println!("cargo:rustc-link-search=native={}", libraries.display());
    for library in ["torch_cpu", "torch", "c10"] {
        println!("cargo:rustc-link-lib=dylib={library}");
    }
    // Link arguments reach this package's own tests and examples only; other programs read `libtorch_lib`.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", libraries.display());
    println!("cargo:rustc-link-arg=-Wl,--no-as-needed,-ltorch_cpu,-ltorch,-lc10,--as-needed");
    println!("cargo:libtorch_lib={}", libraries.display());
    Ok(())
}

/// The directories of libtorch's headers: `LIBTORCH_INCLUDE` where torch-sys heeds it too, else beside the libraries.
fn include_directories(libraries: &Path) -> Result<[PathBuf; 2], String> {
    println!("cargo:rerun-if-env-changed=LIBTORCH_INCLUDE");
    println!("cargo:rerun-if-env-changed=LIBTORCH_USE_PYTORCH");
    let root = match env::var_os("LIBTORCH_INCLUDE") {
        Some(root) if env::var_os("LIBTORCH_USE_PYTORCH").is_none() => PathBuf::from(root),
        _ => libraries.parent().unwrap_or(libraries).to_owned(),
    };
    let include = root.join("include");
    if !include.join("ATen/core/dispatch/Dispatcher.h").is_file() {
        return Err(format!(
            "no headers of libtorch in {} (its libraries are in {}); install a libtorch with headers, or set LIBTORCH_INCLUDE to \
             the directory above `include`",
            include.display(),
            libraries.display()
        ));
    }
    let api = include.join("torch/csrc/api/include");
    Ok([include, api])
}

/// Which ABI of std::string libtorch was built with: what `LIBTORCH_CXX11_ABI` says, as torch-sys asks it, else the new
/// one, the only one that has been shipped since 2.7.
fn cxx11_abi() -> String {
    println!("cargo:rerun-if-env-changed=LIBTORCH_CXX11_ABI");
    env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|_| {
        format!("{name} is not set: this build script runs under cargo, after the one of torch-sys")
    })
}

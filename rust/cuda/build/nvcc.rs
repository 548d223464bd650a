//! Finding nvcc and running it, one process a family.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What the search below reads.
pub const VARIABLES: [&str; 6] = ["HALFBYTE_NVCC", "NVCC", "PYO3_PYTHON", "CUDA_HOME", "CUDA_PATH", "PATH"];

/// The ones that name an nvcc, which then has to work.
const NAMING: [&str; 2] = ["HALFBYTE_NVCC", "NVCC"];

/// The first toolkit whose nvcc knows every default target.
const OLDEST: (u32, u32) = (12, 9);

/// 13.2.0 and 13.2.1 miscompile byte-wise reads of packed integers.
const BROKEN: [&str; 2] = ["V13.2.51", "V13.2.78"];

/// No fused multiply-add but those that are written, and no fast maths: the CPU defines every bit.
const FLAGS: [&str; 7] =
    ["-fatbin", "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-fmad=false", "--compress-mode=none", "-Xptxas=-v"];

pub struct Nvcc {
    path: PathBuf,
    /// `V13.0.88`
    pub version: String,
}

/// The nvcc named by a variable, else the first of: Python packages, toolkit folders, PATH.
pub fn find() -> Result<Nvcc, String> {
    for name in NAMING {
        if let Some(path) = variable(name) {
            return Nvcc::open(PathBuf::from(path)).map_err(|error| format!("{name}: {error}"));
        }
    }
    let path = candidates().into_iter().find(|path| path.is_file());
    let path =
        path.ok_or("no nvcc found; install the packages of pyproject.toml's [build-system] or a CUDA toolkit")?;
    Nvcc::open(path)
}

pub fn is_named() -> bool {
    NAMING.into_iter().any(|name| variable(name).is_some())
}

fn candidates() -> Vec<PathBuf> {
    let pythons = variable("PYO3_PYTHON").into_iter().chain([OsString::from("python3")]);
    let packages = pythons.flat_map(|python| nvidia_packages(&python)).map(|folder| folder.join("cu13/bin/nvcc"));
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable);
    let toolkits = toolkits.map(|folder| PathBuf::from(folder).join("bin/nvcc"));
    let searched =
        env::split_paths(&variable("PATH").unwrap_or_default()).map(|folder| folder.join("nvcc")).collect::<Vec<_>>();
    packages.chain(toolkits).chain(searched).chain([PathBuf::from("/usr/local/cuda/bin/nvcc")]).collect()
}

/// Folders of the `nvidia` namespace package: under build isolation nvcc is there and not on PATH.
fn nvidia_packages(python: &OsString) -> Vec<PathBuf> {
    let code = "import importlib.util as u; s = u.find_spec('nvidia'); \
                print('\\n'.join(s.submodule_search_locations) if s else '')";
    let Ok(output) = Command::new(python).args(["-c", code]).output() else { return Vec::new() };
    String::from_utf8_lossy(&output.stdout).lines().filter(|line| !line.is_empty()).map(PathBuf::from).collect()
}

/// An environment variable; empty counts as unset.
fn variable(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}

impl Nvcc {
    fn open(path: PathBuf) -> Result<Self, String> {
        let output = Command::new(&path).arg("--version").output();
        let output = output.map_err(|error| format!("cannot run {}: {error}", path.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let word = text.split([' ', ',', '\n']).find(|word| word.starts_with('V') && word.contains('.'));
        let version = word.ok_or(format!("{} --version names no version", path.display()))?.to_string();
        if BROKEN.contains(&version.as_str()) {
            return Err(format!("{} is {version}, which miscompiles byte-wise reads", path.display()));
        }
        let mut numbers = version[1..].split('.').map_while(|part| part.parse().ok());
        let release: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if release < OLDEST {
            return Err(format!(
                "{} is {version}; {}.{} is the oldest that will do",
                path.display(),
                OLDEST.0,
                OLDEST.1
            ));
        }
        Ok(Self { path, version })
    }

    /// Writes `<family>.fatbin`, and ptxas' report of registers and spills as `<family>.ptxas`.
    pub fn compile_all(&self, families: &[&str], archs: &[String], out: &Path) -> Result<(), String> {
        let next = AtomicUsize::new(0);
        let worker = || -> Result<(), String> {
            while let Some(family) = families.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.compile(family, archs, out)?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..jobs()).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| "a compiler thread panicked")?)
        })
    }

    fn compile(&self, family: &str, archs: &[String], out: &Path) -> Result<(), String> {
        let source = format!("src/{family}.cu");
        let inputs = self.inputs(&source, archs, out)?;
        let remembered = out.join(format!("{family}.inputs"));
        if std::fs::read_to_string(&remembered).is_ok_and(|last| last == inputs) {
            return Ok(());
        }
        let mut command = Command::new(&self.path);
        command.args(FLAGS).args(archs.iter().flat_map(|arch| gencode(arch)));
        command.arg("-I").arg(out).arg("-o").arg(out.join(format!("{family}.fatbin"))).arg(&source);
        let output = command.output().map_err(|error| format!("cannot run {}: {error}", self.path.display()))?;
        let report = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            let hint = "a C++ compiler must be on PATH; HALFBYTE_CUDA=0 builds without CUDA";
            return Err(format!("{source} does not compile ({hint}):\n{command:?}\n{report}"));
        }
        super::write(&out.join(format!("{family}.ptxas")), &report)?;
        super::write(&remembered, &inputs)
    }

    /// All that an image depends on: cargo runs this script again whenever core changes, nvcc need not.
    fn inputs(&self, source: &str, archs: &[String], out: &Path) -> Result<String, String> {
        let mut inputs = format!("{} {archs:?} {FLAGS:?}\n", self.version);
        let headers =
            super::device_sources()?.into_iter().filter(|path| path.extension().is_some_and(|end| end == "cuh"));
        for path in headers.chain([out.join("codebook.cuh"), out.join("entry_tables.cuh"), PathBuf::from(source)]) {
            inputs += &super::read(&path)?;
        }
        Ok(inputs)
    }
}

fn gencode(arch: &str) -> [String; 2] {
    let (number, code) = match arch.strip_prefix("compute_") {
        Some(number) => (number, arch.to_string()),
        None => (arch, format!("sm_{arch}")),
    };
    ["-gencode".to_string(), format!("arch=compute_{number},code={code}")]
}

fn jobs() -> usize {
    env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1)
}

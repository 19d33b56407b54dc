// The child of run_tests.py for Java: compile /repo, run the named test files, report each test over standard output.
//
// stdin: the nonce and the test files relative to /repo, NUL between them
// A test file T.java declares a class T.  Its tests are `public static void main(String[])`, with the id
// "path/T.java::main", and every public method without parameters whose name begins with "test", run on an object of
// its own, with the id "path/T.java::testName".  A test passed when it returned.  Assertions are switched on.
// One virtual machine compiles the repository and runs it. This file itself is compiled once (srl_jax/sandbox/toolchain.py).

import com.sun.source.tree.CompilationUnitTree;
import com.sun.source.util.JavacTask;
import java.io.FileDescriptor;
import java.io.FileOutputStream;
import java.io.PrintStream;
import java.lang.reflect.InvocationTargetException;
import java.lang.reflect.Method;
import java.lang.reflect.Modifier;
import java.net.URL;
import java.net.URLClassLoader;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Comparator;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.stream.Stream;
import javax.tools.Diagnostic;
import javax.tools.DiagnosticCollector;
import javax.tools.JavaCompiler;
import javax.tools.JavaFileObject;
import javax.tools.StandardJavaFileManager;
import javax.tools.ToolProvider;

public class RunJava {
    static final Path REPOSITORY = Path.of(System.getProperty("repository", "/repo"));
    static final Path CLASSES = Path.of(System.getProperty("java.io.tmpdir"), "classes");
    static PrintStream results;
    static String nonce;

    public static void main(String[] arguments) throws Exception {
        results = new PrintStream(new FileOutputStream(FileDescriptor.out), true, StandardCharsets.UTF_8);
        System.setOut(System.err);
        String[] parts = new String(System.in.readAllBytes(), StandardCharsets.UTF_8).split("\0");
        nonce = parts[0];
        List<String> files = Arrays.asList(parts).subList(1, parts.length);
        Map<String, String> packages = compile();
        if (packages == null) {
            for (String file : files) report(file, "failed");
        } else {
            ClassLoader loader = new URLClassLoader(new URL[] {CLASSES.toUri().toURL(), REPOSITORY.toUri().toURL()});
            for (String file : files) run(file, packages.getOrDefault(file, ""), loader);
        }
        System.err.flush();
        results.println("{\"nonce\": " + quoted(nonce) + ", \"end\": true}");
        Runtime.getRuntime().halt(0);  // without the threads and hooks that the repository may have left
    }

    /** Compiles every Java file; the package of each, or null when that failed (the compiler has said why). */
    static Map<String, String> compile() throws Exception {
        List<Path> sources = new ArrayList<>();
        try (Stream<Path> walk = Files.walk(REPOSITORY)) {
            walk.filter(path -> path.toString().endsWith(".java")).forEach(sources::add);
        }
        Files.createDirectories(CLASSES);
        JavaCompiler compiler = ToolProvider.getSystemJavaCompiler();
        Map<String, String> packages = new HashMap<>();
        try (StandardJavaFileManager manager = compiler.getStandardFileManager(null, null, StandardCharsets.UTF_8)) {
            List<String> options = List.of("-d", CLASSES.toString(), "-proc:none", "-nowarn");
            var units = manager.getJavaFileObjectsFromPaths(sources);
            DiagnosticCollector<JavaFileObject> said = new DiagnosticCollector<>();
            JavacTask task = (JavacTask) compiler.getTask(null, manager, said, options, null, units);
            for (CompilationUnitTree unit : task.parse()) {
                String name = REPOSITORY.relativize(Path.of(unit.getSourceFile().toUri())).toString();
                packages.put(name, unit.getPackageName() == null ? "" : unit.getPackageName() + ".");
            }
            task.analyze();
            task.generate();
            boolean failed = false;
            for (var problem : said.getDiagnostics()) {
                System.err.println(problem);
                failed |= problem.getKind() == Diagnostic.Kind.ERROR;
            }
            return failed ? null : packages;
        }
    }

    static void run(String file, String prefix, ClassLoader loader) {
        String stem = Path.of(file).getFileName().toString().replaceFirst("\\.java$", "");
        Method[] methods;
        try {
            methods = Class.forName(prefix + stem, true, loader).getMethods();
        } catch (Throwable trouble) {  // whatever loading foreign code raises: the file has no tests
            trouble.printStackTrace();
            report(file, "failed");
            return;
        }
        Arrays.sort(methods, Comparator.comparing(Method::getName));
        for (Method method : methods) {
            boolean entry = method.getName().equals("main") && Modifier.isStatic(method.getModifiers())
                && Arrays.equals(method.getParameterTypes(), new Class<?>[] {String[].class});
            if (!entry && !(method.getName().startsWith("test") && method.getParameterCount() == 0)) continue;
            String outcome = "failed";
            try {
                if (entry) {
                    method.invoke(null, (Object) new String[0]);
                } else {
                    boolean bound = !Modifier.isStatic(method.getModifiers());
                    method.invoke(bound ? method.getDeclaringClass().getConstructor().newInstance() : null);
                }
                outcome = "passed";
            } catch (InvocationTargetException trouble) {
                trouble.getCause().printStackTrace();
            } catch (Throwable trouble) {
                trouble.printStackTrace();
            }
            report(file + "::" + method.getName(), outcome);
        }
    }

    static void report(String id, String outcome) {
        results.println(
            "{\"nonce\": " + quoted(nonce) + ", \"id\": " + quoted(id) + ", \"outcome\": " + quoted(outcome) + "}");
    }

    static String quoted(String text) {
        StringBuilder json = new StringBuilder("\"");
        for (char c : text.toCharArray()) {
            if (c < ' ' || c == '"' || c == '\\' || c > '~') json.append(String.format("\\u%04x", (int) c));
            else json.append(c);
        }
        return json.append('"').toString();
    }
}
